"""What kernels with a gate per channel share: segments close their gates."""

import jax.numpy as jnp

from efficient_attn.kernels.decay_tree import tiles
from efficient_attn.kernels.layout import CHUNK, by_head

# exp is exactly zero.
CLOSED = -1000.0


def scaled_queries(ref, group, scale):
  """Queries of a group times the scale, in tiles."""
  return tiles(ref[0, group].astype(jnp.float32) * scale)


def float_keys(ref, group):
  """Keys of a group, in tiles."""
  return tiles(ref[0, group].astype(jnp.float32))


def closed_gate(log_decay, starts, sizes):
  """The gates by head; where a segment begins they let nothing through."""
  if starts is not None:
    log_decay = jnp.where(starts[..., None, None, None], CLOSED, log_decay)
  return by_head(log_decay, sizes, jnp.float32)


def by_key(starts, sizes):
  """[B, T] to [B, 1, chunks * CHUNK, 1]."""
  missing = sizes.chunks * CHUNK - sizes.length
  return jnp.pad(starts, ((0, 0), (0, missing)))[:, None, :, None]


def marked_reads(starts, blocks):
  """Marks tokens of the segment before their chunk, [B, 1, T, 1]."""
  if starts is None:
    return []
  cuts = by_key(starts, blocks.sizes)
  counts = jnp.cumsum(cuts.reshape(cuts.shape[0], -1, CHUNK), -1, jnp.int32)
  reads = jnp.where(counts == 0, 1.0, 0.0).astype(jnp.float32)
  return [(reads.reshape(cuts.shape), blocks.tokens_of_row())]


def split_refs(refs, segments):
  """What `marked_reads` gave, or None, and the other references."""
  return (refs[0], refs[1:]) if segments else (None, refs)


def kept(state, total, segments):
  """The decayed state; of another segment, where it may be anything, zero."""
  decayed = state * total
  return jnp.where(total > 0, decayed, 0) if segments else decayed


def reading(past, reads_ref):
  """What tokens read of the state, zero where it is of another segment.

  The decay is zero there, and the state may be anything.
  """
  return past if reads_ref is None else jnp.where(reads_ref[0, 0] > 0, past, 0)
