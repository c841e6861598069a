"""Text: documents -> shuffle -> tokens -> rows of seq_len + 1 -> batches.

Row r of the batch is a stream of its own: records r, r + B, r + 2 B, ... of the
shuffled records, tokenized and cut into rows one after the other. So a batch
mixes B documents however long they are, and processes, which own rows, read
disjoint records and together the same batches as one process would.

A batch is `dict(tokens, segment_ids, positions)`, each [B, seq_len + 1] int32;
with a tokenizer also `bytes`, those of the text that each token stands for.
Rows overlap by one token, so that as the target of the one before it
(`tokens[:, 1:]`) every token counts exactly once an epoch. A target counts if
its segment id is positive and equal to that of its input.

  packing='concat': every document ends with the tokenizer's end token, and
    what follows may look back at it. All segment ids are 1.
  packing='segments': a document also begins with the end token, and has a
    segment id and positions of its own within the row. (In training, so has a
    piece of a file, whose first token then is no target.)

With `data.corruption` rows of `seq_len` tokens are corrupted, see `corruption`.
"""

import functools
import hashlib
import lzma
import zlib

import grain
import jax
import numpy as np

from efficient_attn.config import DataConfig
from efficient_attn.data import batches, documents, sources
from efficient_attn.data.corruption import CORRUPTIONS, positions
from efficient_attn.data.damage import BadDataError, Restored
from efficient_attn.data.tokenizer import ByteTokenizer, load_tokenizer


def load(
  config: DataConfig, *, batch_size: int, seed: int, rows: range
) -> batches.Data:
  """Returns both splits; see `efficient_attn.data.load`."""
  tokenizer = load_tokenizer(config.tokenizer)
  segments = config.packing == 'segments'
  exact = isinstance(tokenizer, ByteTokenizer)  # a piece of a file is a row
  corrupt = None
  if config.corruption:
    corrupt = CORRUPTIONS[config.corruption](config, tokenizer)
  length = corrupt.length if corrupt else config.seq_len
  layout = sources.Layout(
    piece=length if exact else 32 * length,
    marks=2 if segments else 1,
    lines=not exact,
  )
  found = documents.load(config, layout)
  encode = functools.partial(
    _Encoder,
    tokenizer=tokenizer,
    segments=segments,
    sized=not exact and not corrupt,
  )

  def rows_of(encoded, *entropy):
    found = _rows(encoded, length, segments)
    if corrupt:
      (state,) = np.random.SeedSequence(entropy).generate_state(1)
      found = found.random_map(corrupt, seed=int(state))
    return found

  records = grain.MapDataset.source(found.train).seed(seed).shuffle().repeat()
  encoded = records.map(encode(shuffled=True, patience=20 * len(found.train)))
  streams = [rows_of(encoded[row::batch_size], seed, row) for row in rows]
  batched = Restored(grain.experimental.ZipIterDataset(streams).map(_stack))
  in_order = grain.MapDataset.source(found.valid).map(encode(shuffled=False))
  example = corrupt.example if corrupt else _example(length, sized=not exact)
  identity = f'{found.fingerprint} {tokenizer.fingerprint}'
  notes = (NO_END.format(config.tokenizer),)
  return batches.Data(
    train=batches.prefetch(batched, config.workers),
    # Corrupted alike whatever the seed of the run.
    valid=batches.finite(rows_of(in_order), batch_size, rows),
    example=example,
    valid_example=example,
    tokenizer=tokenizer,
    vocab_size=(corrupt or tokenizer).vocab_size,
    valid_bytes=functools.partial(_raw, found.valid),
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    notes=notes if tokenizer.eos_id is None and not segments else (),
  )


NO_END = (
  'data.tokenizer={!r} has no token that ends a document, so that with '
  "data.packing='concat' documents follow each other without a mark; name one "
  'as eos_token in a tokenizer_config.json beside the file'
)


def _example(length, *, sized):
  row = jax.ShapeDtypeStruct((length + 1,), np.int32)
  names = ('tokens', 'segment_ids', 'positions', *['bytes'] * sized)
  return dict.fromkeys(names, row)


def _rows(encoded, length, segments):
  pairs = encoded.to_iter_dataset(batches.READ)
  return _Pack(pairs, length).map(functools.partial(_row, segments=segments))


class _Encoder:
  """Turns records into [N, 2]: the token before each one, and that token.

  The former is -1 where there is none to see. With `sized` [N, 3]: also how
  many bytes of the text the token stands for.
  """

  def __init__(self, *, tokenizer, segments, sized, shuffled, patience=0):
    self._tokenizer, self._segments = tokenizer, segments
    self._columns = 3 if sized else 2
    self._shuffled = shuffled
    self._patience = patience  # records without a token in a row; 0: any
    self._silent = 0
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    self._end = np.array(end, int)

  def __call__(self, parts):
    pairs = np.concatenate([self._encode(part) for part in parts])
    self._silent = 0 if len(pairs) else self._silent + 1
    if self._silent > self._patience > 0:
      raise BadDataError(
        f'the last {self._silent} records of data.path had no text or no token '
        'of data.tokenizer; name other files'
      )
    return {'pairs': pairs[:, : self._columns].astype(np.int32)}

  def _encode(self, part):
    end, segments = self._end, self._segments
    ids, sizes = self._tokenizer.encode_sized(part.text)
    tokens, counts = [ids], [sizes]
    if part.begins and segments:
      tokens.insert(0, end)
      counts.insert(0, np.zeros_like(end))
    if part.ends:
      # What the tokenizer drops has bytes, too.
      dropped = 0 if len(ids) else len(_as_bytes(part.text))
      tokens.append(end)
      counts.append(np.full_like(end, dropped))
    tokens, counts = np.concatenate(tokens), np.concatenate(counts)
    if segments and (part.begins or self._shuffled):
      known = end[:0]
    else:
      known = self._tokenizer.encode(part.before) if part.before else end
    previous = known[-1] if len(known) else -1
    shifted = np.concatenate([[previous], tokens])[: len(tokens)]
    return np.stack([shifted, tokens, counts], axis=1)


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


def _stack(rows):
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


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


def _raw(source) -> bytes:
  parts = (part.text for i in range(len(source)) for part in source[i])
  return b''.join(map(_as_bytes, parts))


def _as_bytes(text):
  return text.encode() if isinstance(text, str) else text


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
  """Returns what general compressors reach on `data`, at their best level."""
  sizes = {
    'zlib': len(zlib.compress(data, 9)),
    'xz': len(lzma.compress(data, preset=9)),
  }
  return {name: 8 * size / len(data) for name, size in sizes.items()}
