"""Data: `load(config)` returns endless training and finite validation batches.

data = load(config.data, batch_size=8, seed=0)
batches = iter(data.train)      # has get_state and set_state
for batch in data.valid: ...    # every token or image once
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from efficient_attn.config import ConfigError, DataConfig, choose
from efficient_attn.data import (
  corruption,
  digits,
  labelled,
  mixture,
  tasks,
  text,
)
from efficient_attn.data.batches import Data, row_tokens
from efficient_attn.data.damage import BadDataError
from efficient_attn.data.text import compressed_bits_per_byte
from efficient_attn.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
  'DATASETS',
  'BadDataError',
  'Data',
  'Tokenizer',
  'complete',
  'compressed_bits_per_byte',
  'kind_of',
  'load',
  'load_tokenizer',
  'row_tokens',
]


class Dataset(NamedTuple):
  """A row of `DATASETS`.

  Attributes:
    load: opens it, see `load`.
    kind: of its batches, see `kind_of`.
    reads: the keys of `DataConfig` that it reads; the others are to be left
      out.
  """

  load: Callable[..., Data]
  kind: str
  reads: tuple[str, ...]


def _load_text(config: DataConfig, **options) -> Data:
  return (labelled if config.label_key else text).load(config, **options)


DATASETS = {
  'text': Dataset(
    _load_text,
    'text',
    (
      'path',
      'valid_path',
      'valid_every',
      'mixture',
      'text_key',
      'label_key',
      'tokenizer',
      'seq_len',
      'packing',
      'corruption',
      'corruption_rate',
      'span_length',
      'workers',
    ),
  ),
  'pixels': Dataset(labelled.load_pixels, 'labelled', ('workers',)),
  'digits': Dataset(digits.load, 'images', ('augment', 'workers')),
} | dict.fromkeys(
  tasks.TASKS,
  Dataset(
    tasks.load,
    'task',
    ('options', 'valid_options', 'train_examples', 'valid_examples', 'workers'),
  ),
)


def kind_of(config: DataConfig) -> str:
  """Returns what the batches of a config are.

  text: tokens to continue. task: tokens with answers. images: with a label.
  masked, spans: text to restore, see `corruption`. labelled: sequences of one
  class each, see `labelled`.
  """
  dataset = choose('data.name', config.name, DATASETS)
  if config.label_key:
    return 'labelled'
  return corruption.KINDS.get(config.corruption, dataset.kind)


def complete(config: DataConfig) -> DataConfig:
  """Returns the config with all options of its dataset.

  Raises:
    ConfigError: a key is set that the dataset does not read.
  """
  dataset = choose('data.name', config.name, DATASETS)
  default = DataConfig()
  for field in dataclasses.fields(DataConfig):
    value = getattr(config, field.name)
    if field.name in ('name', *dataset.reads):
      continue
    if value != getattr(default, field.name):
      raise ConfigError(
        f'data.{field.name}={value!r} is not a key of data.name='
        f'{config.name!r}, which reads {", ".join(dataset.reads)}; leave it '
        f"out, or set all keys at once: --config.data=\"{{'name': "
        f'{config.name!r}}}"'
      )
  if dataset.kind == 'task':
    return tasks.complete(config)
  corruption.check_keys(config)
  options = mixture.read_options(config)
  mixed = {name: dataclasses.asdict(of) for name, of in options.items()}
  return dataclasses.replace(config, mixture=mixed)


def load(
  config: DataConfig,
  *,
  batch_size: int,
  seed: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Data:
  """Opens a dataset.

  Args:
    config: What to read.
    batch_size: Rows of a batch over all processes.
    seed: Of the order and the augmentation of the training data.
    process_index: Which process this is.
    process_count: How many share a batch; each gets equally many rows of it,
      `process_index` saying which.
  """
  dataset = choose('data.name', config.name, DATASETS)
  if batch_size % process_count:
    raise ConfigError(
      f'batch_size={batch_size} is not divisible by the {process_count} '
      'processes that share it'
    )
  size = batch_size // process_count
  rows = range(process_index * size, (process_index + 1) * size)
  return dataset.load(
    config, batch_size=batch_size, seed=seed % 2**32, rows=rows
  )
