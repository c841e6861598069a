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


def chunk(state, tokens, marks, *, inclusive: bool):
  """The same for C tokens, [B, K, (G,) C, X].

  Scalar gates scale values and outputs, not keys, which all heads of a group
  share; `gates.ChunkDecay` would take half as long again with 4 heads a group.
  """
  q, k, v, gate = tokens
  dtype = state.dtype
  operand = shapes.operand(dtype, q, k, v)

  def dot(spec, *xs):
    xs = [x.astype(operand) for x in xs]
    return jnp.einsum(spec, *xs, preferred_element_type=dtype)

  size = v.shape[-2]
  mask = np.tri(size, k=0 if inclusive else -1, dtype=bool)
  if marks is not None:
    mask &= marks.same[:, None, None]
    reads = marks.reads[:, None, None, :, None]
    writes = marks.writes[:, None, None, :, None]
    keeps = marks.keeps[:, None, None, None, None]

  if gate is not None and gate.shape[-1] > 1:
    q, k = q[:, :, None].astype(dtype), k[:, :, None].astype(dtype)
    scores, before, after = gates.decayed_scores(
      q, k, gate, inclusive=inclusive, operand=operand
    )
    read = dot('bkgih,bkghv->bkgiv', q * jnp.exp(before), state)
    k = k * jnp.exp(after)
    if marks is not None:
      k = jnp.where(writes, k, 0)
    write = dot('bkgjh,bkgjv->bkghv', k, v)
    kept = jnp.exp(gates.total(gate, after))[..., None] * state
  else:
    scores = dot('bkih,bkjh->bkij', q, k)[:, :, None]
    read = dot('bkih,bkghv->bkgiv', q, state)
    value, kept = v, state
    if gate is not None:
      spans, before, after = gates.span_sums(gate[..., 0], inclusive=inclusive)
      scores = scores * jnp.exp(spans)
      read = read * jnp.exp(before)[..., None]
      value = v.astype(dtype) * jnp.exp(after)[..., None]
      kept = jnp.exp(gates.total(gate, after[..., None]))[..., None] * state
    if marks is not None:
      value = jnp.where(writes, value, 0)
    write = dot('bkjh,bkgjv->bkghv', k, value)
  scores = jnp.where(mask, scores, 0)
  if marks is not None:
    read = jnp.where(reads, read, 0)
    kept = jnp.where(keeps, kept, 0)
  if scores.shape[2] == 1:
    inside = dot('bkij,bkgjv->bkgiv', scores[:, :, 0], v)
  else:
    inside = dot('bkgij,bkgjv->bkgiv', scores, v)
  return kept + write, inside + read
