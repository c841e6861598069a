"""Tasks on tokens, with an answer at some of them: `data.name` is one of TASKS.

Example i of a split is a function of the seed and i, so that a run resumes
where it stopped. Batches are `dict(tokens, labels [B, T] int32, weights [B, T]
float32)`, with labels for the token at hand, not shifted.

A task is one dataclass: its fields are `data.options`, `num_tokens` is the
vocabulary it needs, and `draw(rng, train)` returns an `Example`. Images and
documents are not drawn: `stored(train)` returns those of a split, and
`read(item)` the example of one. Training then takes all of them, or
`data.train_examples`, and validation at most `data.valid_examples`, always the
same ones.
"""

import dataclasses
import typing

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
from efficient_attn.values import build, read_arguments

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


def make(config: DataConfig, *, train: bool = True):
  """Returns the task of a config, with the options of a split."""
  task = TASKS[config.name]
  if train:
    return build(task, config.options, 'data.options.')
  kinds = typing.get_type_hints(task, include_extras=True)
  changes = read_arguments(
    kinds, config.valid_options, 'data.valid_options.', config.name
  )
  return build(task, dict(config.options) | changes, 'data.options.')


def complete(config: DataConfig) -> DataConfig:
  """Returns the config with all options of its task."""
  options = dataclasses.asdict(make(config))
  changed = {
    name: getattr(make(config, train=False), name)
    for name in config.valid_options
  }
  return dataclasses.replace(config, options=options, valid_options=changed)


class _Examples:
  """Random access to the examples of one split, at most `count`."""

  def __init__(self, task, seed: int, count: int, train: bool):
    self.task, self.seed, self.count, self.train = task, seed, count, train
    self.stored = task.stored(train)
    if self.stored is not None:  # the first ones are a fair sample
      self.order = np.random.default_rng(0).permutation(len(self.stored))
      self.count = min(count, len(self.stored))

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if self.stored is not None:
      example = self.task.read(self.stored[self.order[index]])
    else:
      rng = np.random.default_rng([self.seed, self.train, index])
      example = self.task.draw(rng, self.train)
    return example._asdict()


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
