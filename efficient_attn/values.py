"""Reads the values of a config by the annotation of where they go.

A config class, a mixer and a task say what a value may be where they declare
it, `window: Positive = 128`. `read_value` turns a value, or the string of one
from a command line, into that type, and `read_arguments` does so for the
options of a function. A value that does not fit is a `ConfigError` of one line.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import ml_collections
import numpy as np


class ConfigError(ValueError):
  """The user's configuration is wrong; the message is meant for the user."""


@contextlib.contextmanager
def under(key: str):
  """Puts a key in front of the errors of what does not know its key."""
  try:
    yield
  except ConfigError as error:
    raise ConfigError(f'{key}: {error}') from error


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns 'did you mean ...?' or the list of valid names."""
  valid = sorted(valid)
  close = difflib.get_close_matches(str(name), valid, n=1)
  if close:
    return f'did you mean {close[0]!r}?'
  return f'valid: {", ".join(valid)}'


def choose(key: str, name: str, table: Mapping[str, Any]) -> Any:
  """Returns `table[name]`; an unknown name is a `ConfigError` about `key`."""
  if not isinstance(name, str) or name not in table:
    raise ConfigError(f'{key}={name!r} is unknown; {nearest(name, table)}')
  return table[name]


@dataclasses.dataclass(frozen=True)
class Range:
  """Bounds of a number, with or without the bounds themselves."""

  low: float = -math.inf
  high: float = math.inf
  above: bool = False  # not `low` itself
  below: bool = False  # not `high` itself

  def check(self, key: str, value: float) -> None:
    """Raises unless `value` lies within the bounds."""
    low = value > self.low if self.above else value >= self.low
    high = value < self.high if self.below else value <= self.high
    if not (low and high):
      raise ConfigError(f'{key}={_short(value)} must be {self}')

  def __str__(self):
    if self.high == LARGEST:
      return f'>= {self.low} and at most {LARGEST}'
    if self.high == math.inf:
      return f'{"> " if self.above else ">= "}{self.low}'
    left, right = '[('[self.above], '])'[self.below]
    return f'in {left}{self.low}, {self.high}{right}'


@dataclasses.dataclass(frozen=True)
class OneOf:
  """The names that a string may be."""

  names: tuple[str, ...]

  def check(self, key: str, value: str) -> None:
    """Raises unless `value` is one of the names."""
    choose(key, value, dict.fromkeys(self.names))


@dataclasses.dataclass(frozen=True)
class PowerOfTwo:
  """A number that is 1, 2, 4, ..."""

  def check(self, key: str, value: int) -> None:
    """Raises unless `value` is a power of two."""
    if value < 1 or value & (value - 1):
      raise ConfigError(f'{key}={_short(value)} must be a power of two, as 64')


LARGEST = 2**31 - 1  # array dimensions and steps are int32

Positive = Annotated[int, Range(1, LARGEST)]
NonNegative = Annotated[int, Range(0, LARGEST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, above=True)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
ChunkSize = Annotated[int, Range(1, LARGEST), PowerOfTwo()]
Dtype = Annotated[str, OneOf(('float32', 'bfloat16', 'float16', 'float64'))]


def read_value(kind: Any, value: Any, key: str) -> Any:
  """Returns `value` as `kind`, an annotation.

  Args:
    kind: bool, int, float, str, tuple[...], a mapping, a config dataclass, a
      union of these, or one of them with `Range` or `OneOf` attached.
    value: of that type, or a string that spells it as on a command line.
    key: named by errors.

  Raises:
    ConfigError: the value is of another type or outside its range.
  """
  origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
  if origin is Annotated:
    value = read_value(args[0], value, key)
    for condition in args[1:]:
      condition.check(key, value)
    return value
  if origin in (typing.Union, types.UnionType):
    return _read_union(args, value, key)
  if dataclasses.is_dataclass(kind):
    if isinstance(value, kind):
      return value
    value = _literal(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
      raise ConfigError(f'{key}={_short(value)} must be a group of keys')
    return build_group(kind, value, f'{key}.')
  if origin is str:
    if not isinstance(value, str):
      raise _wrong(key, value, 'str')
    return value
  if isinstance(value, str):
    value = _literal(value)
  if origin is tuple:
    return _read_tuple(args[0], value, key)
  if isinstance(origin, type) and issubclass(origin, Mapping):
    return _read_mapping(args[1], value, key)
  if origin is bool and isinstance(value, str):
    value = {'true': True, 'false': False}.get(value.lower(), value)
  kinds = {
    bool: (bool, np.bool_),
    int: numbers.Integral,
    float: numbers.Real,
    types.NoneType: types.NoneType,
  }
  is_bool = isinstance(value, (bool, np.bool_))
  if not isinstance(value, kinds[origin]) or is_bool != (origin is bool):
    raise _wrong(key, value, origin.__name__)
  if origin is types.NoneType:
    return None
  if origin is float and not (abs(value) < math.inf):
    raise ConfigError(f'{key}={_short(value)} must be finite')
  return origin(value)


def _read_union(kinds, value, key):
  """Reads the first of several types that the value fits."""
  errors = []
  for kind in kinds:
    try:
      return read_value(kind, value, key)
    except ConfigError as error:
      if kind is not types.NoneType:
        errors.append(error)
  # Of the type that the value has, its range is what is wrong.
  of_ranges = [e for e in errors if not isinstance(e, _WrongTypeError)]
  if of_ranges or len(errors) == 1:
    raise (of_ranges or errors)[0]
  raise _wrong(key, value, ' or '.join(_name(kind) for kind in kinds))


def _read_tuple(item, value, key):
  if isinstance(value, str):
    value = [part.strip() for part in value.split(',')]
    value = value[:-1] if value[-1] == '' else value
  if isinstance(value, (bool, numbers.Number)):
    value = (value,)  # --config.sweep.seeds=0
  if not isinstance(value, (tuple, list)):
    raise _wrong(key, value, 'tuple')
  return tuple(read_value(item, v, f'{key}[{i}]') for i, v in enumerate(value))


def _read_mapping(item, value, key):
  if not isinstance(value, Mapping):
    raise ConfigError(f'{key}={_short(value)} must be a group of keys')
  for name in value:
    if not isinstance(name, str):
      raise ConfigError(f'{key} has the key {name!r}; keys must be names')
  if item is Any:
    return dict(value)
  return {
    name: read_value(item, v, f'{key}.{name}') for name, v in value.items()
  }


def build_group(
  cls,
  values: Mapping[str, Any],
  prefix: str,
  replaced: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
  """Builds a dataclass from values whose names, types and ranges are checked.

  Args:
    cls: the dataclass.
    values: by the names of its fields; strings as from a command line.
    prefix: of the names in errors, 'data.'.
    replaced: annotations to use in place of those of `cls`.
  """
  hints = typing.get_type_hints(cls, include_extras=True) | dict(replaced)
  kinds = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
  return cls(**read_arguments(kinds, values, prefix))


def check_ranges(group: Any, prefix: str) -> None:
  """Checks the annotated ranges of a dataclass that was built directly."""
  hints = typing.get_type_hints(type(group), include_extras=True)
  for name, kind in hints.items():
    value = getattr(group, name, None)
    if typing.get_origin(kind) is Annotated and isinstance(
      value,
      (str, numbers.Real),  # a grid traces its numbers
    ):
      for condition in typing.get_args(kind)[1:]:
        condition.check(f'{prefix}{name}', value)


class Group:
  """A group of keys, whose numbers and names are within their ranges."""

  prefix: ClassVar[str]  # of its keys in errors

  def __post_init__(self):
    check_ranges(self, self.prefix)


def read_arguments(
  kinds: Mapping[str, Any],
  values: Mapping[str, Any],
  prefix: str,
  owner: str = '',
) -> dict[str, Any]:
  """Reads arguments by name, each by the annotation in `kinds`.

  Args:
    kinds: annotations by name.
    values: those that are given; strings as from a command line.
    prefix: of the names in errors, 'model.mixers.gla.'.
    owner: what has these options, for errors.
  """
  found = {}
  for name, value in values.items():
    if name not in kinds:
      known = f'an option of {owner}' if owner else 'a known key'
      raise ConfigError(
        f'{prefix}{name}={_short(value)} is not {known}; {nearest(name, kinds)}'
      )
    found[name] = read_value(kinds[name], value, f'{prefix}{name}')
  return found


def as_dict(values: Any) -> dict[str, Any]:
  """Returns a ConfigDict, mapping or config dataclass as nested plain dicts.

  Dtypes become their names and array scalars numbers, as JSON has neither.
  """
  if dataclasses.is_dataclass(values):
    values = {
      f.name: getattr(values, f.name) for f in dataclasses.fields(values)
    }
  if isinstance(values, ml_collections.ConfigDict):
    values = values.to_dict()
  return {k: _plain(v) for k, v in values.items()}


def _plain(value):
  if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
    return as_dict(value)
  if isinstance(value, (np.dtype, type)) and hasattr(value, 'dtype'):
    return np.dtype(value.dtype).name  # jnp.bfloat16
  if isinstance(value, np.dtype):
    return value.name
  if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item'):
    return value.item()
  return value


class _WrongTypeError(ConfigError):
  """A value of another type than its annotation."""


def _wrong(key, value, wanted):
  return _WrongTypeError(
    f'{key}={_short(value)} is a {type(value).__name__}; '
    f'it must be of type {wanted}'
  )


def _name(kind):
  origin = typing.get_origin(kind)
  if origin is Annotated:
    return _name(typing.get_args(kind)[0])
  return getattr(kind if origin is None else origin, '__name__', str(kind))


def _short(value, most: int = 60):
  """The repr of a value, cut to one short line."""
  try:
    text = repr(value)
  except ValueError:  # an int of thousands of digits
    text = f'an integer of {value.bit_length()} bits'
  text = ' '.join(text.split())
  return text if len(text) <= most else f'{text[: most - 3]}...'


def _literal(text):
  try:
    return ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text
