"""Tasks on tokens, with an answer at some of them: `data.name` is one of TASKS.

Example i of a split is a function of the seed and i, so that a run resumes
where it stopped. Batches are `dict(tokens, labels [B, T] int32, weights [B, T]
float32)`, with labels for the token at hand, not shifted.

A task is one dataclass: its fields are `data.options`, `num_tokens` is the
vocabulary it needs, and `draw(rng, train)` returns an `Example`. Images and
documents are not drawn: `stored(train)` returns those of a split, and
`example_of(item)` the example of one. Training then takes all of them, or
`data.train_examples`, and validation at most `data.valid_examples`, always the
same ones.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import grain
import numpy as np

from efficient_attn.config import DataConfig
from efficient_attn.data import batches
from efficient_attn.data.tasks.byte_classification import ByteClassification
from efficient_attn.data.tasks.copying import (
  Palindrome,
  SelectiveCopying,
  Stack,
)
from efficient_attn.data.tasks.example import Example
from efficient_attn.data.tasks.groups import StateTracking
from efficient_attn.data.tasks.image_sequence import ImageSequence
from efficient_attn.data.tasks.list_ops import ListOps
from efficient_attn.data.tasks.memory import Compression, Memorization
from efficient_attn.data.tasks.pathfinder import Pathfinder
from efficient_attn.data.tasks.recall import (
  MQAR,
  FuzzyRecall,
  InContextRecall,
  Induction,
  Needle,
  NoisyRecall,
)
from efficient_attn.values import build_group, read_arguments

TASKS = {
  'mqar': MQAR,
  'in_context_recall': InContextRecall,
  'noisy_recall': NoisyRecall,
  'fuzzy_recall': FuzzyRecall,
  'induction': Induction,
  'needle': Needle,
  'selective_copying': SelectiveCopying,
  'palindrome': Palindrome,
  'stack': Stack,
  'memorization': Memorization,
  'compression': Compression,
  'state_tracking': StateTracking,
  'list_ops': ListOps,
  'pathfinder': Pathfinder,
  'image_sequence': ImageSequence,
  'byte_classification': ByteClassification,
}

ENDLESS = 2**31 - 1
MOST_KEPT = 2**30  # bytes of a split


def make(config: DataConfig, *, train: bool = True):
  """Returns the task of a config, with the options of a split."""
  task = TASKS[config.name]
  if train:
    return build_group(task, config.options, 'data.options.')
  kinds = typing.get_type_hints(task, include_extras=True)
  changes = read_arguments(
    kinds, config.valid_options, 'data.valid_options.', config.name
  )
  return build_group(task, dict(config.options) | changes, 'data.options.')


def complete(config: DataConfig) -> DataConfig:
  """Returns the config with all options of its task."""
  options = dataclasses.asdict(make(config))
  changed = {
    name: getattr(make(config, train=False), name)
    for name in config.valid_options
  }
  return dataclasses.replace(config, options=options, valid_options=changed)


class _Examples:
  """Random access to the examples of one split, at most `count`.

  A finite split that comes again every epoch is kept, as drawing it takes
  longer than training on it.
  """

  def __init__(self, task, seed: int, count: int, train: bool):
    self.task, self.seed, self.count, self.train = task, seed, count, train
    self.kept = None
    self.stored = task.stored(train)
    if self.stored is not None:  # the first ones are a fair sample
      self.order = np.random.default_rng(0).permutation(len(self.stored))
      self.count = min(count, len(self.stored))
    elif count < ENDLESS:
      self.kept = _kept(task, seed, count, train)

  def __len__(self):
    return self.count

  def __getstate__(self):
    """Processes that prepare batches draw again: each would keep a copy."""
    return self.__dict__ | dict(kept=None)

  def __getitem__(self, index):
    if self.stored is not None:
      return self.task.example_of(self.stored[self.order[index]])._asdict()
    if self.kept is not None:
      return self.kept.get(index, self._draw)._asdict()
    return self._draw(index)._asdict()

  def _draw(self, index) -> Example:
    rng = np.random.default_rng([self.seed, self.train, index])
    return self.task.draw(rng, self.train)


class _Kept:
  """Examples that were drawn, in arrays with room for all of a split."""

  def __init__(self, first: Example, count: int):
    # Memory is taken when it is written to.
    self.arrays = [np.empty((count, *x.shape), x.dtype) for x in first]
    self.known = np.zeros(count, bool)

  def get(self, index: int, draw: Callable[[int], Example]) -> Example:
    """Returns one example, drawn unless it has been."""
    if not self.known[index]:
      for array, x in zip(self.arrays, draw(index), strict=True):
        array[index] = x
      self.known[index] = True
    return Example(*(array[index] for array in self.arrays))


@functools.lru_cache(maxsize=4)  # the seeds of a grid, for its next program
def _kept(task, seed: int, count: int, train: bool) -> _Kept | None:
  """Returns room for a split, the same for every one that is equal."""
  first = task.draw(np.random.default_rng(0), train)
  if count * sum(x.nbytes for x in first) > MOST_KEPT:
    return None
  return _Kept(first, count)


def load(
  config: DataConfig, *, batch_size: int, seed: int, rows: range
) -> batches.Data:
  """Returns both splits; see `efficient_attn.data.load`.

  The validation examples are the same for every seed.
  """
  task, valid_task = make(config), make(config, train=False)
  count = config.train_examples or ENDLESS
  examples = _Examples(task, seed, count, train=True)
  valid_examples = _Examples(valid_task, 0, config.valid_examples, train=False)
  train = grain.MapDataset.source(examples)
  if len(train) < ENDLESS:
    train = train.seed(seed).shuffle()
  valid = grain.MapDataset.source(valid_examples).to_iter_dataset(batches.READ)
  return batches.Data(
    train=batches.endless(train.repeat(), batch_size, rows, config.workers),
    valid=batches.finite(valid, batch_size, rows),
    example=examples[0],
    valid_example=valid_examples[0],
    vocab_size=max(task.num_tokens, valid_task.num_tokens),
    fingerprint=task.fingerprint(True) + valid_task.fingerprint(False),
  )
