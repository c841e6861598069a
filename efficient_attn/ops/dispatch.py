"""Choosing an implementation per platform that a program is lowered for.

An op with kernels lists them in a literal table, name -> `Implementation`, in
order of preference; its definition, plain JAX, is the row 'xla'. `choose` gives
the row of each platform, which `per_platform` takes when a program is lowered.
"""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from efficient_attn.ops.per_platform import PLATFORMS
from efficient_attn.values import ConfigError

XLA = 'xla'
# The same, as accelerators run it: many chunks at once.
XLA_PARALLEL = 'xla_parallel'


class Implementation(NamedTuple):
  """A kernel with its gradient.

  Attributes:
    call: maps (*args, interpret=, **statics) to what the definition returns.
    forward: the same, to (outputs, residuals).
    backward: maps (args, residuals, cotangents, interpret=, **statics) to the
      cotangents of args, None for those without.
    platforms: where it runs compiled; asked for by name it is interpreted
      elsewhere.
    refuses: maps the shapes and statics of a call to the reason why this row
      cannot serve it, or to None.
  """

  call: Callable[..., Any]
  forward: Callable[..., Any]
  backward: Callable[..., Any]
  platforms: tuple[str, ...]
  refuses: Callable[..., str | None]


def choose(
  table: Mapping[str, Implementation],
  implementation: str | Sequence[str] | None,
  *,
  op: str,
  **request: Any,
) -> dict[str | None, str]:
  """Chooses a row of the table per platform.

  Args:
    table: kernels by name, in order of preference.
    implementation: a name, 'xla' and 'xla_parallel' included; a sequence of
      names, of which the first that does not refuse is used; or None for the
      best per platform.
    op: the name of the op, for errors.
    **request: what `refuses` takes.

  Returns:
    The name of the row by platform; None stands for every other platform,
    and no entry for 'xla'.

  Raises:
    ConfigError: a name that does not exist.
    NotImplementedError: every row that was named refuses, with the reasons.
  """
  if implementation is None:
    rows = {}
    for name, row in table.items():
      if row.refuses(**request) is None:
        for platform in row.platforms:
          rows.setdefault(platform, name)
    return rows
  names = implementation
  if isinstance(names, str):
    names = (names,)
  if not names:
    raise ConfigError('implementation is empty; name one, or pass None.')
  known = (*table, XLA, XLA_PARALLEL)
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0)
      raise ConfigError(
        f'implementation {name!r} of {op} does not exist; did you mean'
        f' {near[0]!r}? There are {", ".join(known)}.'
      )
  reasons = []
  for name in names:
    if name == XLA:
      return {}
    if name == XLA_PARALLEL:
      return {None: name}
    reason = table[name].refuses(**request)
    if reason is None:
      return {None: name}
    reasons.append(f'{name}: {reason}')
  raise NotImplementedError(
    f'{op}: no implementation that was named can: {"; ".join(reasons)}. Pass'
    " None or 'xla'."
  )


def explain(
  table: Mapping[str, Implementation],
  implementation: str | Sequence[str] | None,
  *,
  op: str,
  **request: Any,
) -> str:
  """Says which row each platform takes, and why not another."""
  try:
    rows = choose(table, implementation, op=op, **request)
  except NotImplementedError as error:
    return str(error)
  taken = [
    f'{platform}: {rows.get(platform, rows.get(None, XLA))}'
    for platform in PLATFORMS
  ]
  refused = [
    f'not {name}: {reason}'
    for name, row in table.items()
    if (reason := row.refuses(**request)) is not None
  ]
  return '; '.join(taken + refused)


def kernels(
  table: Mapping[str, Implementation],
  rows: Mapping[str | None, str],
  stage: str,
  **statics: Any,
) -> dict[str | None, Callable]:
  """The functions of a stage ('call', 'forward', 'backward') by platform."""
  found = {}
  for platform, name in rows.items():
    row = table[name]
    function = getattr(row, stage)
    found[platform] = functools.partial(
      function, interpret=platform not in row.platforms, **statics
    )
    if platform is None:
      for own in row.platforms:
        found[own] = functools.partial(function, interpret=False, **statics)
  return found
