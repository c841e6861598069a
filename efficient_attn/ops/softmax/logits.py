"""Attention from a whole matrix of logits, however they were made.

  o_t = sum_s p_ts v_s,   p_t = softmax_s(logits_ts)

over the admitted keys s; zeros where there are none. For logits that are not
products of queries and keys; O(T S) time and memory.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from efficient_attn.ops.products import product
from efficient_attn.ops.shapes import check_shapes
from efficient_attn.ops.softmax.stats import Stats, exp_below, largest


def attend_logits(
  logits: Float[Array, '#B N T S'],
  value: Float[Array, 'B S N V'],
  *,
  mask: Bool[Array, '#B #N T S'] | None = None,
) -> Float[Array, 'B T N V']:
  """The values weighted by a softmax of the logits, in the values' dtype."""
  B, S, N, _ = value.shape
  batch = B if logits.shape[0] > 1 else 1
  check_shapes({'logits': (logits, (batch, N, logits.shape[2], S))})
  stats = jnp.promote_types(logits.dtype, jnp.float32)
  logits = logits.astype(stats)
  value = heads_first(value)
  if mask is not None:
    logits = jnp.where(mask, logits, -jnp.inf)
    value = jnp.where(jnp.any(mask, axis=2)[..., None], value, 0)
  top = largest(logits)
  weights = exp_below(logits, top[..., None])
  total = jnp.sum(weights, axis=-1)
  weights = jnp.broadcast_to(weights, (B, *weights.shape[1:]))
  out = product(
    'bnts,bnsv->bntv', weights, value, operand=value.dtype, dtype=stats
  )
  out = Stats(top, total).divide(out)
  return heads_first(out).astype(value.dtype)


def heads_first(x: Float[Array, 'B T N H']) -> Float[Array, 'B N T H']:
  """Tokens and heads exchanged: products of heads are plain batched matmuls.

  On a CPU that halves the time of a call.
  """
  return x.swapaxes(1, 2)
