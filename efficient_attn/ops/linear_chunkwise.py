"""The additive recurrence in chunks, and in one chunk (`parallel`).

A chunk of C tokens reads the state before it through decayed queries, its
own tokens through C x C decayed scores, and writes decayed keys:

  O = tril(decayed scores) V + (Q * before) S,
  S <- diag(total) S + (K * after)^T V.

Work is O(T C (H + V) + T H V) in matrix products. The scan keeps only the
T / C states; what happens inside a chunk is computed again in the backward
pass.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from efficient_attn.ops import chunks, gates


def chunkwise(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K G V'],
  gate: Float[Array, '#B T K G #H'] | None,
  counts: Int[Array, 'B T'] | None,
  state: Float[Array, 'B K G H V'],
  *,
  inclusive: bool,
  chunk_size: int,
) -> tuple[Float[Array, 'B T K G V'], Float[Array, 'B K G H V']]:
  """Scans over chunks; the state is the only residual of the backward."""
  length = v.shape[1]
  size = chunks.chunk_length(length, chunk_size)
  # Heads lead inside a chunk: [chunks, B, K, (G,) C, ...].
  q, k, v, gate = jax.tree.map(
    lambda x: jnp.moveaxis(chunks.to_chunks(x, size), 2, -2), (q, k, v, gate)
  )
  previous = None
  if counts is not None:
    counts = chunks.to_chunks(counts, size, pad='edge')
    previous = chunks.counts_before(counts)
  body = functools.partial(_chunk, inclusive=inclusive)
  inputs = (q, k, v, gate, counts, previous)
  if v.shape[0] == 1:
    state, out = body(state, jax.tree.map(lambda x: x[0], inputs))
    out = out[None]
  else:
    state, out = jax.lax.scan(jax.checkpoint(body), state, inputs)
  out = jnp.moveaxis(out, (0, -2), (1, 2))  # [B, chunks, C, K, G, V]
  out = out.reshape(out.shape[0], -1, *out.shape[3:])
  return out[:, :length], state


def parallel(q, k, v, gate, counts, state, *, inclusive: bool):
  """All T x T scores at once: `chunkwise` with one chunk."""
  size = 1 << (v.shape[1] - 1).bit_length()
  return chunkwise(
    q, k, v, gate, counts, state, inclusive=inclusive, chunk_size=size
  )


def _chunk(state, inputs, *, inclusive):
  """One chunk: the state after it, and its outputs [B, K, G, C, V]."""
  q, k, v, gate, counts, previous = inputs
  dtype = state.dtype
  wanted = jnp.result_type(q, k, v)
  operand = wanted if wanted == jnp.bfloat16 else dtype

  def dot(spec, *xs):
    xs = [x.astype(operand) for x in xs]
    return jnp.einsum(spec, *xs, preferred_element_type=dtype)

  size = v.shape[-2]
  mask = np.tri(size, k=0 if inclusive else -1, dtype=bool)
  if counts is not None:
    mask &= (counts[:, :, None] == counts[:, None, :])[:, None, None]
    reads = (counts == previous[:, None])[:, None, None, :, None]
    writes = (counts == counts[:, -1:])[:, None, None, :, None]
    keeps = (previous == counts[:, -1])[:, None, None, None, None]

  if gate is not None and gate.shape[-1] > 1:
    q, k = q[:, :, None].astype(dtype), k[:, :, None].astype(dtype)
    scores, before, after = gates.decayed_scores(
      q, k, gate, inclusive=inclusive, operand=operand
    )
    read = dot('bkgih,bkghv->bkgiv', q * jnp.exp(before), state)
    k = k * jnp.exp(after)
    if counts is not None:
      k = jnp.where(writes, k, 0)
    write = dot('bkgjh,bkgjv->bkghv', k, v)
    kept = jnp.exp(_total(gate, after))[..., None] * state
  else:
    scores = dot('bkih,bkjh->bkij', q, k)[:, :, None]
    read = dot('bkih,bkghv->bkgiv', q, state)
    value, kept = v, state
    if gate is not None:
      spans, before, after = gates.span_sums(gate[..., 0], inclusive=inclusive)
      scores = scores * jnp.exp(spans)
      read = read * jnp.exp(before)[..., None]
      value = v.astype(dtype) * jnp.exp(after)[..., None]
      total = _total(gate, after[..., None])
      kept = jnp.exp(total)[..., None] * state
    if counts is not None:
      value = jnp.where(writes, value, 0)
    write = dot('bkjh,bkgjv->bkghv', k, value)
  scores = jnp.where(mask, scores, 0)
  if counts is not None:
    read = jnp.where(reads, read, 0)
    kept = jnp.where(keeps, kept, 0)
  if scores.shape[2] == 1:
    inside = dot('bkij,bkgjv->bkgiv', scores[:, :, 0], v)
  else:
    inside = dot('bkgij,bkgjv->bkgiv', scores, v)
  return kept + write, inside + read


def _total(gate, after):
  """The gates of the whole chunk: the first one and all after it."""
  return gate[..., 0, :] + after[..., 0, :]
