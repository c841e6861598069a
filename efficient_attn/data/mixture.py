"""Mixtures of text: `data.mixture` names sources and weights them.

Weights are in tokens. Each source is packed into rows of its own, all of one
length, and every row of a batch comes from one source. Row r of batch k is of
the source whose interval of [0, 1), as wide as its share of the weights, holds

  (k g + r / B) mod 1,    g the golden ratio

so that a batch of B rows has B times its share of each source, rounded up or
down, and so has each row over time, within a few rows. (Grain's interleaving
would give all rows of a batch the same source.)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.values import NonNegativeFloat, nearest, read_value

GOLDEN = 0x9E3779B97F4A7C15  # its fraction, in units of 2^-64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Keys of a source, which are those of the data without a mixture.

  Attributes:
    text_key: '' for `data.text_key`.
    weight: in tokens, relative to those of the other sources.
  """

  path: str = ''
  valid_path: str = ''
  text_key: str = ''
  weight: NonNegativeFloat = 1.0


class Source(NamedTuple):
  """One source of text.

  Attributes:
    name: its key; that of the only one is `data.path`.
    share: of the tokens of training; 0 validates only.
    config: that of the data, with the paths of this source.
    prefix: of these paths in errors.
  """

  name: str
  share: float
  config: DataConfig
  prefix: str


class Reading(NamedTuple):
  """The share and the epochs of a source in some steps of training."""

  source: str
  share: float
  epochs: float

  def __str__(self):
    return (
      f'{self.source}: {self.share:.2f} of tokens, {self.epochs:.3g} epochs'
    )


def read_options(config: DataConfig) -> dict[str, Options]:
  """Returns the options of each source, with their types."""
  return read_value(Mapping[str, Options], config.mixture, 'data.mixture')


def sources(config: DataConfig) -> list[Source]:
  """Returns the sources of a config, at least one."""
  if not config.mixture:
    name = config.path or "Python's standard library"
    return [Source(name, 1.0, config, 'data.')]
  for key in ('path', 'valid_path'):
    if getattr(config, key):
      raise ConfigError(
        f'data.{key}={getattr(config, key)!r} is not read beside data.mixture; '
        'leave it out, or make it a source of the mixture'
      )
  options = read_options(config)
  named = [name for name, source in options.items() if source.path]
  for name, source in options.items():
    if not source.path:
      known = nearest(name, named) if named else 'every source needs one'
      raise ConfigError(f"data.mixture.{name}.path='' names no text; {known}")
  largest = max(source.weight for source in options.values())
  if not largest:
    names = ', '.join(config.mixture)
    raise ConfigError(
      f'data.mixture: the weights of {names} are all 0; raise one of them'
    )
  total = sum(source.weight / largest for source in options.values())
  return [
    Source(
      name,
      source.weight / largest / total,
      dataclasses.replace(
        config,
        mixture={},
        path=source.path,
        valid_path=source.valid_path,
        text_key=source.text_key or config.text_key,
      ),
      f'data.mixture.{name}.',
    )
    for name, source in options.items()
  ]


def mix(
  rows: Mapping[str, grain.IterDataset],
  shares: Mapping[str, float],
  place: float,
) -> grain.IterDataset:
  """Mixes endless rows of several sources.

  Args:
    rows: of each source.
    shares: of each source, of all rows; they add up to 1.
    place: of these rows in the batches, in [0, 1).
  """
  if len(rows) == 1:
    (only,) = rows.values()
    return only
  return _Mix(list(rows.values()), [shares[name] for name in rows], place)


class _Mix(grain.IterDataset):
  def __init__(self, parents, shares, place):
    super().__init__(parents)
    self._ends = np.cumsum(shares)[:-1]
    self._start = int(place * 2**64)

  def __iter__(self):
    iterators = [iter(parent) for parent in self._parents]
    return _MixIterator(iterators, self._ends, self._start)


class _MixIterator(grain.DatasetIterator):
  def __init__(self, parents, ends, start):
    super().__init__(parents)
    self._ends, self._start, self._count = ends, start, 0

  def __next__(self):
    place = (self._start + self._count * GOLDEN) % 2**64 / 2**64
    row = next(self._parents[np.searchsorted(self._ends, place, 'right')])
    self._count += 1
    return row

  def get_state(self):
    parents = [parent.get_state() for parent in self._parents]
    return {'parents': parents, 'count': self._count}

  def set_state(self, state):
    for parent, its in zip(self._parents, state['parents'], strict=True):
      parent.set_state(its)
    self._count = state['count']


def readings(
  found: Sequence[Source], tokens: Mapping[str, float], read: float
) -> list[Reading]:
  """Returns how often each source is read.

  Args:
    found: the sources.
    tokens: of an epoch of each source.
    read: tokens that training reads of all of them.
  """
  return [
    Reading(s.name, s.share, s.share * read / max(tokens[s.name], 1))
    for s in found
  ]
