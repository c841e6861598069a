"""One token and one chunk of S_t = diag(alpha_t) S_{t-1} + k_t v_t^T.

A chunk of C tokens reads the state before it through decayed queries, its
own tokens through C x C decayed scores, and writes decayed keys:

  O = tril(decayed scores) V + (Q * before) S,
  S <- diag(total) S + (K * after)^T V.

Work is O(T C (H + V) + T H V) in matrix products.
"""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops import shapes
from efficient_attn.ops.products import product
from efficient_attn.ops.recurrent import gates


def step(state, token, *, inclusive: bool):
  """State [B,K,G,H,V]; q, k [B,K,H], v [B,K,G,V], gate [B,K,G,H|1] or None."""
  q, k, v, gate = token
  q, k, v = (x.astype(state.dtype) for x in (q, k, v))
  before = state
  if gate is not None:
    state = jnp.exp(gate)[..., None] * state
  state = state + k[:, :, None, :, None] * v[..., None, :]
  return state, jnp.einsum(
    'bkh,bkghv->bkgv',
    q,
    state if inclusive else before,
    precision=jax.lax.Precision.HIGHEST,
  )


def prepare(tokens, marks, *, inclusive: bool, wide: bool):
  """Prepares what C tokens [B, K, (G,) C, X] write, and read among them.

  Scalar gates scale values and outputs, not keys, which all heads of a group
  share; `gates.ChunkDecay` would take half as long again with 4 heads a group.
  """
  q, k, v, gate = tokens
  dtype = shapes.accumulator(q, k, v, gate)
  operand = shapes.operand(dtype, q, k, v)
  size = v.shape[-2]
  mask = np.tri(size, k=0 if inclusive else -1, dtype=bool)
  if marks is not None:
    mask &= marks.same[:, None, None]
  options = dict(inclusive=inclusive, wide=wide)

  value, total, before = v, None, None
  if gate is not None and gate.shape[-1] > 1:
    q, k = q[:, :, None].astype(dtype), k[:, :, None].astype(dtype)
    scores, before, after = gates.decayed_scores(
      q, k, gate, operand=operand, **options
    )
    q, k, before = q * jnp.exp(before), k * jnp.exp(after), None
    if marks is not None:
      k = jnp.where(marks.writes[:, None, None, :, None], k, 0)
    total = jnp.exp(gates.total(gate, after))[..., None]
  else:
    scores = _dot('bkih,bkjh->bkij', q, k, operand, dtype)[:, :, None]
    if gate is not None:
      spans, before, after = gates.span_sums(gate[..., 0], **options)
      scores = scores * jnp.exp(spans)
      before = jnp.exp(before)[..., None]
      value = v.astype(dtype) * jnp.exp(after)[..., None]
      total = jnp.exp(gates.total(gate, after[..., None]))[..., None]
    if marks is not None:
      value = jnp.where(marks.writes[:, None, None, :, None], value, 0)
  scores = jnp.where(mask, scores, 0)
  if scores.shape[2] == 1:
    inside = _dot('bkij,bkgjv->bkgiv', scores[:, :, 0], v, operand, dtype)
  else:
    inside = _dot('bkgij,bkgjv->bkgiv', scores, v, operand, dtype)
  writes = k.astype(operand), value.astype(operand), total
  return writes, (q.astype(operand), before, inside)


def advance(state, writes, marks):
  """The state [B, K, G, H, V] after a chunk, and before it for its reads."""
  key, value, total = writes
  spec = 'bkgjh,bkgjv->bkghv' if key.ndim == 5 else 'bkjh,bkgjv->bkghv'
  write = _dot(spec, key, value, key.dtype, state.dtype)
  kept = state if total is None else total * state
  if marks is not None:
    kept = jnp.where(marks.keeps[:, None, None, None, None], kept, 0)
  return kept + write, state.astype(key.dtype)


def read(state, reads, marks, *, wide: bool):
  """The outputs of a chunk: of its own tokens, and of the state before it."""
  del wide
  q, before, inside = reads
  spec = 'bkgih,bkghv->bkgiv' if q.ndim == 5 else 'bkih,bkghv->bkgiv'
  found = _dot(spec, q, state, q.dtype, inside.dtype)
  if before is not None:
    found = found * before
  if marks is not None:
    found = jnp.where(marks.reads[:, None, None, :, None], found, 0)
  return inside + found


def _dot(spec, x, y, operand, dtype):
  return product(spec, x, y, operand=operand, dtype=dtype)
