"""Retention, the mixer of RetNet (Sun et al. 2307.08621).

  S_t = gamma_n S_{t-1} + k_t v_t^T     o_t = S_t^T q_t / sqrt(H)
  gamma_n = 1 - 2^(-5-n) for head n; q and k carry rotary positions.

The output is normalised per head and gated by silu(W_g x). As in fla, rotary
frequencies are 10000^(-2i / H); those of torchscale end at 1 / 10000, and its
norm has no weight and eps = 1e-6.
"""

import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.cache import positions_of
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import LINEAR, GatedOutput, Recurrent
from efficient_attn.ops.positions import rotary
from efficient_attn.values import ChunkSize, Positive, PositiveFloat


class Retention(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = LINEAR.taking(log_decay='N')
  counts = True

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    expand_v: Positive = 2,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    head_dim = d_model // num_heads
    value_dim = expand_v * head_dim
    heads = (num_heads, head_dim)
    self.qkv = QKV(
      d_model,
      query=heads,
      key=heads,
      value=(num_heads, value_dim),
      rngs=rngs,
    )
    self.out = GatedOutput(
      d_model, num_heads, value_dim, eps=norm_eps, rngs=rngs
    )
    self.sizes = dict(N=num_heads, H=head_dim, V=value_dim)
    self.options = dict(bidirectional=not causal, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    positions = positions_of(context, past.cursor, x.shape[1])
    (q, k, v), _ = self.qkv(x)
    o, state = self.scan(
      context,
      past,
      q=rotary(q, positions),
      k=rotary(k, positions),
      v=v,
      log_decay=log_gammas(self.sizes['N']),
    )
    return self.out(o, x), state, None


def log_gammas(num_heads: int):
  """Returns log(1 - 2^(-5-n)) for each head, float32 [N]."""
  return jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(num_heads)))
