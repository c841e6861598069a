"""A mixer class with parts that a row of the method table chooses."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

# Arguments that are no options: what a builder and a mixer give their parts.
COMMON = ('self', 'd_model', 'num_heads', 'causal', 'rngs', 'heads')
PARTS = ('mask_rule', 'weights')


def own_options(cls: type) -> dict[str, inspect.Parameter]:
  """Returns the options that a class and its bases read, by name."""
  found = {}
  for base in reversed(cls.__mro__):
    if '__init__' in vars(base) and base.__module__.startswith('efficient'):
      found |= inspect.signature(base.__init__).parameters
  return {
    name: parameter
    for name, parameter in found.items()
    if name not in COMMON + PARTS
    and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
  }


@dataclasses.dataclass(frozen=True)
class Composed:
  """Builds `mixer` of `parts`; each option goes to the one that reads it.

  Attributes:
    mixer: the class, with an argument for each part.
    parts: by argument, classes called as part(heads=, rngs=, **options).
    defaults: of options, where they are not those of their owner.
    without: options that mean nothing to this combination.
  """

  mixer: type
  parts: Mapping[str, type]
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  without: tuple[str, ...] = ()

  def options(self) -> dict[str, inspect.Parameter]:
    """Returns all options with their defaults, by name."""
    found = own_options(self.mixer)
    for part in self.parts.values():
      found |= own_options(part)
    for name, value in self.defaults.items():
      found[name] = found[name].replace(default=value)
    return {k: v for k, v in found.items() if k not in self.without}

  def __call__(self, **options: Any):
    """Builds the mixer."""
    options = {**self.defaults, **options}
    parts = {}
    for name, part in self.parts.items():
      own = {k: options.pop(k) for k in own_options(part) if k in options}
      parts[name] = functools.partial(part, **own)
    return self.mixer(**options, **parts)
