"""Cutting a sequence into chunks, and segments as masks.

Shared by the chunkwise forms of the linear family. A segment boundary is
never a very negative gate: tokens carry the number of boundaries up to them,
and two tokens belong together when their counts are equal.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from efficient_attn.values import ConfigError


def chunk_length(length: int, chunk_size: int) -> int:
  """The chunk for a sequence: `chunk_size`, less where the sequence is less.

  Always a power of two, because decays are summed by doubling.
  """
  if chunk_size < 1 or chunk_size & (chunk_size - 1):
    raise ConfigError(
      f'chunk_size = {chunk_size} is not a power of two: pass 16, 32, 64, ...'
    )
  return min(chunk_size, 1 << (length - 1).bit_length())


def to_chunks(x: Array, size: int, *, pad: str = 'constant') -> Array:
  """[B, T, ...] to [chunks, B, size, ...], padded at the end.

  `pad` is a mode of `jnp.pad`: zero keys, values and log decays leave the
  state as it is; segment counts repeat their last value ('edge').
  """
  batch, length, *rest = x.shape
  chunks = -(-length // size)
  if missing := chunks * size - length:
    widths = [(0, 0), (0, missing)] + [(0, 0)] * len(rest)
    x = jnp.pad(x, widths, mode=pad)
  return jnp.moveaxis(x.reshape(batch, chunks, size, *rest), 1, 0)


def segment_starts(segment_ids: Int[Array, 'B T']) -> Bool[Array, 'B T']:
  """True where an id differs from the one before it; False at token 0.

  Token 0 continues whatever `initial_state` summarises.
  """
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(changed, ((0, 0), (1, 0)))


def segment_counts(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """The number of segment boundaries up to and including each token."""
  return jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)


def segment_positions(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """The place of each token in its segment, from 0."""
  index = jnp.arange(segment_ids.shape[1])
  starts = jnp.where(segment_starts(segment_ids), index, 0)
  return index - lax.cummax(starts, axis=1)


def first_tokens(
  segment_ids: Int[Array, 'B T'],
  offset: int | Int[Array, ''],
  before: Int[Array, 'B'],
) -> Int[Array, 'B T']:
  """The index of the first token of the segment of each.

  Token 0 has index `offset`, and its segment began at `before`.
  """
  index = offset + jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  starts = jnp.where(segment_starts(segment_ids), index, before[:, None])
  return lax.cummax(starts, axis=1)


def counts_before(counts: Int[Array, 'n B C']) -> Int[Array, 'n B']:
  """The count of the token just before each chunk; 0 before the first."""
  return jnp.pad(counts[:-1, :, -1], ((1, 0), (0, 0)))
