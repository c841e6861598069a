"""Data: `load(config)` returns endless training and finite validation batches.

data = load(config.data, batch_size=8, seed=0)
batches = iter(data.train)      # has get_state and set_state
for batch in data.valid: ...    # every token or image once
"""

from efficient_attn.config import ConfigError, DataConfig, choose
from efficient_attn.data import digits, tasks, text
from efficient_attn.data.batches import Data
from efficient_attn.data.text import compressed_bits_per_byte
from efficient_attn.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
  'DATASETS',
  'Data',
  'Tokenizer',
  'compressed_bits_per_byte',
  'load',
  'load_tokenizer',
]

DATASETS = {'text': text.load, 'digits': digits.load} | dict.fromkeys(
  tasks.TASKS, tasks.load
)


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
  make = choose('data.name', config.name, DATASETS)
  if batch_size % process_count:
    raise ConfigError(
      f'batch_size={batch_size} is not divisible by the {process_count} '
      'processes that share it'
    )
  size = batch_size // process_count
  rows = range(process_index * size, (process_index + 1) * size)
  return make(config, batch_size=batch_size, seed=seed % 2**32, rows=rows)
