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
import numpy as np

from efficient_attn.config import DataConfig
from efficient_attn.data import batches, documents, mixture, sources
from efficient_attn.data.corruption import CORRUPTIONS
from efficient_attn.data.damage import Restored
from efficient_attn.data.packing import Packing
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
    tokens=32 * length,
    marks=2 if segments else 1,
    lines=not exact,
  )
  mixed = mixture.sources(config)
  found = {
    s.name: documents.load(s.config, layout, tokenizer, s.prefix) for s in mixed
  }
  opened = found.values()
  sized = not (exact or corrupt) and all(split.sized for split in opened)
  packing = Packing(tokenizer, length, segments, sized)
  shares = {s.name: s.share for s in mixed if s.share}
  train = {name: packing.shuffled(found[name].train, seed) for name in shares}
  streams = []
  for row in rows:
    own = {name: packing.rows(train[name][row::batch_size]) for name in shares}
    stream = mixture.mix(own, shares, row / batch_size)
    streams.append(_corrupted(stream, corrupt, (seed, row)))
  batched = grain.experimental.ZipIterDataset(streams).map(_stack)
  valid = {name: packing.in_order(split.valid) for name, split in found.items()}

  def held_out(splits):
    joined = packing.rows(grain.MapDataset.concatenate(splits))
    # Corrupted alike whatever the seed of the run.
    return batches.finite(_corrupted(joined, corrupt, ()), batch_size, rows)

  @functools.cache
  def tokens():
    return {name: packing.tokens(split.train) for name, split in found.items()}

  def readings(steps):
    return mixture.readings(mixed, tokens(), steps * batch_size * length)

  parts = {name: held_out([split]) for name, split in valid.items()}
  example = (corrupt or packing).example
  identity = ' '.join(split.fingerprint for split in opened)
  identity = f'{identity} {tokenizer.fingerprint}'
  raw = functools.partial(_raw, [split.valid for split in opened])
  notes = (NO_END.format(config.tokenizer),)
  return batches.Data(
    train=batches.prefetch(Restored(batched), config.workers),
    valid=held_out([*valid.values()]),
    valid_parts=parts if config.mixture else {},
    example=example,
    valid_example=example,
    tokenizer=tokenizer,
    vocab_size=(corrupt or tokenizer).vocab_size,
    valid_bytes=raw if all(split.has_text for split in opened) else None,
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    readings=readings,
    notes=notes if tokenizer.eos_id is None and not segments else (),
  )


NO_END = (
  'data.tokenizer={!r} has no token that ends a document, so that with '
  "data.packing='concat' documents follow each other without a mark; name one "
  'as eos_token in a tokenizer_config.json beside the file'
)


def _corrupted(rows, corrupt, entropy):
  """Corrupts each row by what is drawn from `entropy` and its number."""
  if corrupt is None:
    return rows
  (state,) = np.random.SeedSequence(entropy).generate_state(1)
  return rows.random_map(corrupt, seed=int(state))


def _stack(rows):
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _raw(splits) -> bytes:
  records = (split[i] for split in splits for i in range(len(split)))
  parts = (part.text for record in records for part in record)
  return b''.join(map(sources.as_bytes, parts))


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
  """Returns what general compressors reach on `data`, at their best level."""
  sizes = {
    'zlib': len(zlib.compress(data, 9)),
    'xz': len(lzma.compress(data, preset=9)),
  }
  return {name: 8 * size / len(data) for name, size in sizes.items()}
