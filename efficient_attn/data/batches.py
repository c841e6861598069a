"""What every dataset shares: its result, the split, batching, the processes."""

import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from efficient_attn.data.damage import Restored
from efficient_attn.data.mixture import Reading
from efficient_attn.data.tokenizer import Tokenizer

# Elements are made when asked for: a batch takes about a millisecond.
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """The two splits of a dataset, as this process sees them.

  Attributes:
    train: Endless and shuffled anew every epoch. `iter(train)` has `get_state`
      and `set_state`, and Orbax saves it as it is.
    valid: Every validation token or image once, in order; can be iterated
      again and again. Zeros fill the last batch, with segment id or weight 0.
    valid_parts: The same of each source of a mixture, by its name.
    example: One row of a training batch, or its shapes and dtypes.
    valid_example: The same of a validation batch.
    tokenizer: Of text; None for what has no text.
    vocab_size: Number of tokens, those of `corruption` included; None for
      images.
    num_classes: Of images and labelled sequences; None for others.
    valid_bytes: Returns the raw validation text; None where there is none.
    fingerprint: Changes with the data, though not every byte is looked at; a
      run that continues on other data than it began with can be told by it.
    readings: Returns how often some steps of training read each source of
      text, estimated by some of its records; None for what is no text.
    notes: Lines for the user about how the data is read.
  """

  train: grain.IterDataset
  valid: grain.IterDataset
  valid_parts: Mapping[str, grain.IterDataset] = dataclasses.field(
    default_factory=dict
  )
  example: Mapping[str, Any]
  valid_example: Mapping[str, Any]
  tokenizer: Tokenizer | None = None
  vocab_size: int | None = None
  num_classes: int | None = None
  valid_bytes: Callable[[], bytes] | None = None
  fingerprint: str
  readings: Callable[[int], list[Reading]] | None = None
  notes: tuple[str, ...] = ()


def row_tokens(example: Mapping[str, Any]) -> int:
  """Returns how many tokens of a row a model reads; 0 for images.

  Rows without labels hold their targets too, shifted by one.
  """
  if 'inputs' in example:
    return example['inputs'].shape[-1]
  if 'tokens' not in example:
    return 0
  return example['tokens'].shape[-1] - example.keys().isdisjoint(
    ('label', 'labels')
  )


def held_out(count: int, every: int) -> np.ndarray:
  """Returns which of `count` numbered examples, one in `every`, validate.

  The number decides alone (by Knuth's multiplicative hash), so that examples
  which are appended later never move one from training to validation.
  """
  hashed = np.arange(count, dtype=np.uint32) * np.uint32(2654435761)
  return (hashed >> 16) % every == 0


def endless(
  examples: grain.MapDataset, batch_size: int, rows: range, workers: int
) -> grain.IterDataset:
  """Batches the examples of this process out of an endless sequence."""
  # Batch i of process p is global batch i's rows p * size to (p + 1) * size.
  size = len(rows)
  if size == 1:  # grain counts batches as a float, which endless ones overflow
    examples = examples[: 2**53]
  own = examples.batch(size)[rows.start // size :: batch_size // size]
  return prefetch(Restored(own.to_iter_dataset(READ)), workers)


def finite(
  examples: grain.IterDataset, batch_size: int, rows: range
) -> grain.IterDataset:
  """Batches all examples and keeps the `rows` of this process.

  Every process prepares whole batches, so that all have equally many.
  """
  batches = examples.batch(batch_size, drop_remainder=False)
  return batches.map(functools.partial(_fill, batch_size=batch_size, rows=rows))


def _fill(batch, batch_size, rows):
  filled = {}
  for name, array in batch.items():
    missing = batch_size - len(array)
    widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
    filled[name] = np.pad(array, widths)[rows.start : rows.stop]
  return filled


def prefetch(batches: grain.IterDataset, workers: int) -> grain.IterDataset:
  """Prepares batches in other processes; how many decides their order."""
  if workers and not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads its own, also in a notebook
  return batches.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers), _end_with_parent
  )


def _end_with_parent(index, count):
  del index, count
  end_with_parent()


def end_with_parent() -> None:
  """Ends this process when its parent does, also when that was killed."""

  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
