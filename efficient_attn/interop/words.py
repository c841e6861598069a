"""Words of a foreign config.json and ours, in both directions.

Ours are dotted, 'norms.eps' for `model.norms.eps`; in 'mixers.*.scale' the star
stands for every mixer of the pattern. Each part here reads some words and
writes the same: see `Part`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from efficient_attn.config import ConfigError
from efficient_attn.values import nearest

Words = Mapping[str, Any]
NEEDED = object()  # in place of a default

# Words of every family that change no logits.
IGNORED = frozenset({
  '_attn_implementation', '_attn_implementation_autoset', '_name_or_path',
  '_num_labels', 'architectures', 'attention_dropout', 'attn_pdrop', 'auto_map',
  'bos_token_id', 'cache_implementation', 'chunk_size_feed_forward',
  'classifier_dropout', 'dtype', 'embd_pdrop', 'eos_token_id',
  'hidden_dropout', 'id2label', 'initializer_range', 'is_decoder',
  'is_encoder_decoder', 'label2id', 'model_type', 'num_labels',
  'output_attentions', 'output_hidden_states', 'output_router_logits',
  'pad_token_id', 'pretraining_tp', 'problem_type', 'resid_pdrop',
  'return_dict', 'sep_token_id', 'summary_activation',
  'summary_first_dropout', 'summary_proj_to_labels', 'summary_type',
  'summary_use_proj', 'task_specific_params', 'torch_dtype',
  'transformers_version', 'unsloth_version', 'use_cache',
})  # fmt: skip


class Part(Protocol):
  """Some words of a family.

  Attributes:
    theirs: the words that it reads.
  """

  theirs: tuple[str, ...]

  def read(self, words: Words) -> dict[str, Any]:
    """Returns ours of theirs."""

  def write(self, ours: 'Ours') -> dict[str, Any]:
    """Returns theirs of ours."""


class Ours:
  """Our values by dotted name, for the parts that write them.

  Args:
    values: flat, of a complete config.
  """

  def __init__(self, values: Mapping[str, Any]):
    self._values = values
    self.pattern = values['pattern']
    self.ffns = values['ffn_pattern']  # of each layer

  @property
  def layers(self) -> tuple[str, ...]:
    """The mixer of each layer."""
    count, pattern = self._values['num_layers'], self.pattern
    return tuple(pattern[i % len(pattern)] for i in range(count))

  def get(self, name: str, default: Any = NEEDED) -> Any:
    """Returns a value, or the default where no mixer has it.

    Raises:
      ConfigError: a star stands for mixers that differ in it, or there is
        neither a value nor a default.
    """
    found = [self._values[x] for x in expand(name, self.pattern)
             if x in self._values]  # fmt: skip
    if any(x != found[0] for x in found):
      raise ConfigError(
        f'model.{name} is {" and ".join(map(str, found))}, but the format has '
        'one for all layers'
      )
    if not found and default is NEEDED:
      raise ConfigError(
        f'model.pattern={self.pattern}: models of this format have {name}'
      )
    return found[0] if found else default


def expand(name: str, pattern: Iterable[str]) -> list[str]:
  """Returns the names that one with a star stands for."""
  if not name.startswith('mixers.'):
    return [name]
  _, mixer, option = name.split('.', 2)
  return [
    f'mixers.{x}.{option}' for x in dict.fromkeys(pattern) if mixer in ('*', x)
  ]


def _same(value):
  return value


@dataclasses.dataclass(frozen=True)
class Word:
  """One word of theirs.

  Attributes:
    name: theirs; others by which it went before follow a '|'.
    ours: the names of ours that have its value.
    default: theirs where there is none.
    values: theirs to ours, where they are not the same; others as they are
      unless `strict`.
    convert: from theirs to ours, where it is a number that differs.
    revert: back.
  """

  name: str
  ours: str | tuple[str, ...]
  default: Any = NEEDED
  values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
  strict: bool = False
  convert: Callable[[Any], Any] = _same
  revert: Callable[[Any], Any] = _same

  @property
  def theirs(self) -> tuple[str, ...]:
    """The words that it reads."""
    return tuple(self.name.split('|'))

  def read(self, words: Words) -> dict[str, Any]:
    """Returns ours of theirs."""
    value = word(words, self.name, self.default)
    plain = isinstance(value, (str, int, float, type(None)))
    if self.strict and not (plain and value in self.values):
      valid = nearest(str(value), map(str, self.values))
      raise ConfigError(f'{self.theirs[0]}={value!r} is not supported; {valid}')
    if plain and value in self.values:
      value = self.values[value]
    elif isinstance(value, (int, float)) and self.convert is not _same:
      if value <= 0:
        raise ConfigError(f'{self.theirs[0]}={value!r} must be positive')
      value = self.convert(value)
    names = (self.ours,) if isinstance(self.ours, str) else self.ours
    return dict.fromkeys(names, value)

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns theirs of ours."""
    names = (self.ours,) if isinstance(self.ours, str) else self.ours
    missing = object()
    found = [x for x in (ours.get(n, missing) for n in names)
             if x is not missing]  # fmt: skip
    if not found:
      return {} if self.default is NEEDED else {self.theirs[0]: self.default}
    if any(x != found[0] for x in found):
      said = ', '.join(f'model.{n}={ours.get(n)!r}' for n in names)
      raise ConfigError(f'{said}: the format has one word for them')
    value = found[0]
    for their, our in self.values.items():
      if our == value and type(our) is type(value):
        return {self.theirs[0]: their}
    if isinstance(value, (int, float)):
      value = self.revert(value)
    return {self.theirs[0]: value}


@dataclasses.dataclass(frozen=True)
class Only:
  """A word that may have one value, which changes nothing of ours."""

  name: str
  value: Any
  default: Any = NEEDED  # theirs where there is none

  @property
  def theirs(self) -> tuple[str, ...]:
    """The word that it reads."""
    return (self.name,)

  def read(self, words: Words) -> dict[str, Any]:
    """Refuses other values."""
    default = self.value if self.default is NEEDED else self.default
    value = words.get(self.name, default)
    if value != self.value:
      raise ConfigError(
        f'{self.name}={value!r} is not supported; only {self.value!r} is'
      )
    return {}

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns the one value."""
    return {self.name: self.value}


@dataclasses.dataclass(frozen=True)
class Choice:
  """Words that decide together.

  Attributes:
    theirs: the words.
    read: from all words to ours.
    write: from ours to these words.
  """

  theirs: tuple[str, ...]
  read: Callable[[Words], dict[str, Any]]
  write: Callable[[Ours], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Layers:
  """The mixer of each layer.

  Attributes:
    theirs: the words that it reads.
    names: from the words to the mixers, one a layer.
    words: from the mixers to the words.
  """

  theirs: tuple[str, ...]
  names: Callable[[Words], Sequence[str]]
  words: Callable[[Sequence[str]], dict[str, Any]]

  def read(self, words: Words) -> dict[str, Any]:
    """Returns the shortest pattern that repeats to these layers."""
    return {'pattern': period(self.names(words))}

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns the words of the layers."""
    return self.words(ours.layers)


@dataclasses.dataclass(frozen=True)
class Ffns:
  """The ffn of each layer.

  Attributes:
    theirs: the words that it reads.
    names: from the words to the ffns, one a layer.
    words: from the ffns to the words.
  """

  theirs: tuple[str, ...]
  names: Callable[[Words], Sequence[str]]
  words: Callable[[Sequence[str]], dict[str, Any]]

  def read(self, words: Words) -> dict[str, Any]:
    """Returns the fewest first ffns and the shortest pattern behind them."""
    names = tuple(self.names(words))
    splits = (
      (lead, size - lead)
      for size in range(1, len(names) + 1)
      for lead in range(size)
    )
    for lead, size in splits:
      cycle = {i % size: names[i] for i in range(lead, lead + size)}
      if all(names[i] == cycle[i % size] for i in range(lead, len(names))):
        pattern = tuple(cycle[i] for i in range(size))
        return {'first_ffns': names[:lead], 'ffn_pattern': pattern}
    raise ConfigError(f'{COUNT}={len(names)} must be positive')

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns the words of the layers."""
    return self.words(ours.ffns)


def period(layers: Sequence[str]) -> tuple[str, ...]:
  """Returns the shortest pattern that repeats to `layers`."""
  layers = tuple(layers)
  for size in range(1, len(layers)):
    if all(x == layers[i % size] for i, x in enumerate(layers)):
      return layers[:size]
  return layers


FULL, SLIDING = 'full_attention', 'sliding_attention'
KINDS = {FULL: 'attention', SLIDING: 'window'}
COUNT = 'num_hidden_layers'


def cycle(*kinds: str) -> Callable[[Words], list[str]]:
  """Returns the rule that repeats kinds over the layers."""
  return lambda words: [kinds[i % len(kinds)] for i in range(count_of(words))]


def by_layer(
  key: str, words: Words, default: Callable[[Words], Sequence]
) -> Sequence[Any]:
  """Returns a list of theirs with a value a layer."""
  found = words.get(key)
  found = default(words) if found is None else found
  count = count_of(words)
  if not isinstance(found, (list, tuple)) or len(found) != count:
    raise ConfigError(
      f'{key} must be a list of {COUNT}={count} values, not {found!r}'
    )
  return found


def count_of(words: Words) -> int:
  """Returns the number of layers."""
  return integer(words, COUNT)


def integer(
  words: Words, name: str, default: Any = NEEDED, low: int = 1
) -> int:
  """Returns a word that is a number of things."""
  value = word(words, name, default)
  if not isinstance(value, int) or isinstance(value, bool) or value < low:
    raise ConfigError(f'{name}={value!r} must be a whole number from {low} on')
  return value


def layer_types(
  default: Callable[[Words], Sequence[str]],
  kinds: Mapping[str, str] = KINDS,
  others: tuple[str, ...] = (),
  written: Callable[[Sequence[str]], dict[str, Any]] = lambda _: {},
) -> Layers:
  """Returns the part that reads `layer_types`.

  Args:
    default: the kinds where there is no list.
    kinds: from a kind of theirs to a mixer.
    others: words that `default` reads.
    written: of these what is written, from the mixers of the layers.
  """
  back = {ours: theirs for theirs, ours in kinds.items()}

  def names(words):
    found = by_layer('layer_types', words, default)
    return [choice('layer_types', kind, kinds) for kind in found]

  def write(layers):
    found = [choice('model.pattern', x, back) for x in layers]
    return {'layer_types': found} | written(layers)

  return Layers(('layer_types', *others), names, write)


def choice(key: str, value: Any, table: Mapping[str, Any]) -> Any:
  """Returns a row of a table; another value is not supported."""
  if not isinstance(value, str) or value not in table:
    raise ConfigError(f'{key}: {value!r} is not supported; '
                      f'{nearest(str(value), table)}')  # fmt: skip
  return table[value]


def word(words: Words, name: str, default: Any = NEEDED) -> Any:
  """Returns the value of a word, by the first of its names that is there."""
  for candidate in name.split('|'):
    if candidate in words:
      return words[candidate]
  if default is NEEDED:
    raise ConfigError(f'it has no {name.partition("|")[0]}')
  return default
