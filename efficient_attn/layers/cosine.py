"""Cosine attention: unit queries and keys, and a temperature per head.

  logits_ts = exp(min(a_n, log 100)) cos(q_t, k_s)

with a_n learned (Swin Transformer V2, Liu et al., 2111.09883).
"""

import math

import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import param, value_of


class ScaledUnit(nnx.Module):
  """Maps heads x [B, T, N, H] to vectors of length exp(min(a_n, log 100))."""

  def __init__(self, num_heads: int):
    start = jnp.full(num_heads, math.log(10.0))
    self.log_scale = param(start, ('heads',))

  def __call__(self, x):
    """Normalises and scales every head."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    log_scale = jnp.minimum(value_of(self.log_scale, wide), math.log(100.0))
    y = l2_normalize(x.astype(wide)) * jnp.exp(log_scale)[:, None]
    return y.astype(x.dtype)
