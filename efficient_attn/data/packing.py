"""Packing: records of text, or of its tokens, become rows of one length."""

import dataclasses
import functools

import grain
import jax
import numpy as np

from efficient_attn.data import batches, sources
from efficient_attn.data.corruption import positions
from efficient_attn.data.damage import BadDataError
from efficient_attn.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Packing:
  """Turns records into rows.

  Attributes:
    tokenizer: of text.
    length: targets of a row.
    segments: whether documents are apart.
    sized: whether rows say how many bytes of text each token stands for.
  """

  tokenizer: Tokenizer
  length: int
  segments: bool
  sized: bool

  @property
  def example(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a row."""
    row = jax.ShapeDtypeStruct((self.length + 1,), np.int32)
    names = ('tokens', 'segment_ids', 'positions', *['bytes'] * self.sized)
    return dict.fromkeys(names, row)

  def shuffled(self, source: sources.Source, seed: int) -> grain.MapDataset:
    """Encodes the records of endless epochs."""
    records = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return records.map(Encoder(self, shuffled=True, patience=20 * len(source)))

  def in_order(self, source: sources.Source) -> grain.MapDataset:
    """Encodes every record once."""
    encode = Encoder(self, shuffled=False)
    return grain.MapDataset.source(source).map(encode)

  def rows(self, encoded: grain.MapDataset) -> grain.IterDataset:
    """Joins encoded records and cuts them into rows."""
    pairs = encoded.to_iter_dataset(batches.READ)
    row = functools.partial(_row, segments=self.segments)
    return _Pack(pairs, self.length).map(row)

  def tokens(self, source: sources.Source, most: int = 256) -> float:
    """Estimates the tokens of an epoch by `most` evenly spread records."""
    encode = Encoder(self, shuffled=True)
    numbers = np.unique(np.linspace(0, len(source) - 1, most).astype(int))
    counts = [len(encode(source[int(i)])['pairs']) for i in numbers]
    return float(np.mean(counts)) * len(source)


class Encoder:
  """Turns records into [N, 2]: the token before each one, and that token.

  The former is -1 where there is none to see. With `sized` [N, 3]: also how
  many bytes of the text the token stands for.
  """

  def __init__(self, packing: Packing, *, shuffled: bool, patience: int = 0):
    self._tokenizer, self._segments = packing.tokenizer, packing.segments
    self._columns = 3 if packing.sized else 2
    self._shuffled = shuffled
    self._patience = patience  # records without a token in a row; 0: any
    self._silent = 0
    end = self._tokenizer.eos_id
    end = [] if end is None else [end]
    self._end = np.array(end, int)

  def __call__(self, parts):
    """Returns the pairs of a record."""
    pairs = np.concatenate([self._encode(part) for part in parts])
    self._silent = 0 if len(pairs) else self._silent + 1
    if self._silent > self._patience > 0:
      raise BadDataError(
        f'the last {self._silent} records of data.path had no text or no token '
        'of data.tokenizer; name other files'
      )
    return {'pairs': pairs.astype(np.int32)}

  def _encode(self, part):
    end, segments = self._end, self._segments
    piece = sources.tokenized(part, self._tokenizer)
    columns = [piece.ids]
    if self._columns == 3:
      columns.append(piece.sizes)
    tokens = [np.stack(columns, axis=1)]
    if part.begins and segments:
      tokens.insert(0, _marks(end, 0)[:, : len(columns)])
    if part.ends:
      tokens.append(_marks(end, piece.dropped)[:, : len(columns)])
    tokens = np.concatenate(tokens)
    if segments and (part.begins or self._shuffled):
      known = end[:0]
    else:
      known = end if piece.previous is None else [piece.previous]
    previous = known[-1] if len(known) else -1
    shifted = np.concatenate([[previous], tokens[:, 0]])[: len(tokens)]
    return np.concatenate([shifted[:, None], tokens], axis=1)


def _marks(end, size):
  return np.stack([end, np.full_like(end, size)], axis=1)


def _row(packed, *, segments):
  """Returns one row of a batch from seq_len pairs."""
  previous, tokens, *sizes = packed['pairs'].T
  ids = (packed['pairs_segment_ids'] > 0).astype(np.int32)  # 0 is padding
  if segments:
    begins = previous < 0
    ids *= np.cumsum(begins, dtype=np.int32) + (not begins[0])
  # The first input belongs to the first target, unless nothing precedes it.
  ids = np.concatenate([[ids[0] * (previous[0] >= 0)], ids])
  row = dict(
    tokens=np.concatenate([np.maximum(previous[:1], 0), tokens]),
    segment_ids=ids.astype(np.int32),
    positions=positions(ids),
  )
  if sizes:  # the first token is no target of this row
    row['bytes'] = np.insert(sizes[0], 0, 0)
  return row


class _Pack(grain.experimental.ConcatThenSplitIterDataset):
  """Concatenates pairs and cuts them into rows of `length`."""

  def __init__(self, parent, length):
    super().__init__(parent, length_struct={'pairs': length})

  def __iter__(self):
    return _PackIterator(super().__iter__())


class _PackIterator(grain.DatasetIterator):
  """Grain's iterator, with a state that survives JSON.

  The packer compares its slices with a tuple; JSON, in which checkpoints keep
  them, has only lists.
  """

  def __next__(self):
    return next(self._parent)

  def get_state(self):
    return self._parent.get_state()

  def set_state(self, state):
    slices = {k: tuple(v) for k, v in state['remainder_slices'].items()}
    self._parent.set_state(state | {'remainder_slices': slices})
