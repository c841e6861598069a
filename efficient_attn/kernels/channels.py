"""Parts of kernels with a gate per channel: segments close their gates."""

import jax
import jax.numpy as jnp

from efficient_attn.kernels.decay_tree import tiles
from efficient_attn.kernels.layout import CHUNK, by_head, by_token

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


def gate_cotangent(d_gate, log_decay, starts, sizes):
  """The gradient of `log_decay` from that of `closed_gate`, by head."""
  shape = (sizes.batch, *log_decay.shape[1:])
  d_gate = by_token(d_gate, jax.ShapeDtypeStruct(shape, jnp.float32))
  if starts is not None:
    d_gate = jnp.where(starts[..., None, None, None], 0, d_gate)
  if log_decay.shape[0] != sizes.batch:
    d_gate = jnp.sum(d_gate, 0, keepdims=True)
  return d_gate.astype(log_decay.dtype)


def past_starts(q, starts):
  """Queries of the state before their token's gate, or their gradient.

  That gate therefore cannot close the past of a segment's first token. Its
  query is zero instead.
  """
  return q if starts is None else jnp.where(starts[..., None, None], 0, q)


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


def split_refs(refs, there):
  """Splits off a reference that there may be, or None."""
  return (refs[0], refs[1:]) if there else (None, refs)


def kept(state, total, segments):
  """The decayed state; of another segment, where it may be anything, zero."""
  decayed = state * total
  return jnp.where(total > 0, decayed, 0) if segments else decayed


def reading(past, reads_ref):
  """Keeps what tokens read of the state, zero where it is of another segment.

  The decay is zero there, and the state may be anything. Rows are those of a
  chunk, or of several sets of queries below each other.
  """
  if reads_ref is None:
    return past
  rows = past.reshape(-1, CHUNK, past.shape[-1])
  return jnp.where(reads_ref[0, 0] > 0, rows, 0).reshape(past.shape)


def row_products(x, y):
  """The products of the rows of x and y, [C, 1]."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return jnp.sum(x * y, 1, keepdims=True)
