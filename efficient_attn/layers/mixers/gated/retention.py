"""Retention, the mixer of RetNet (Sun et al. 2307.08621).

  S_t = gamma_n S_{t-1} + k_t v_t^T     o_t = S_t^T q_t / sqrt(H)
  gamma_n = 1 - 2^(-5-n) for head n; q and k carry rotary positions.

The output is normalised per head and gated by silu(W_g x). As in fla, rotary
frequencies are 10000^(-2i / H); those of torchscale end at 1 / 10000, and its
norm has no weight and eps = 1e-6.
"""

import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.cache import next_positions
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import GatedOutput, run_op
from efficient_attn.ops.positions import rotary
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.values import ChunkSize, Positive, PositiveFloat


class Retention(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

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
    self.state_shape = (num_heads, head_dim, value_dim)
    self.options = dict(bidirectional=not causal, chunk_size=chunk_size)

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    positions = context.positions
    length = x.shape[1]
    if positions is None:
      positions = next_positions(cache, length)
    (q, k, v), _ = self.qkv(x)
    o, state = run_op(
      linear_attention,
      dict(
        q=rotary(q, positions),
        k=rotary(k, positions),
        v=v,
        log_decay=log_gammas(self.state_shape[0]),
      ),
      segment_ids=context.segment_ids,
      state=cache and cache['state'],
      **self.options,
    )
    if cache is not None:
      cache = dict(state=state, length=cache['length'] + length)
    return self.out(o, x), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state; `max_len` does not matter."""
    return dict(
      state=jnp.zeros((batch, *self.state_shape)),
      length=jnp.zeros((), jnp.int32),
    )


def log_gammas(num_heads: int):
  """Returns log(1 - 2^(-5-n)) for each head, float32 [N]."""
  return jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(num_heads)))
