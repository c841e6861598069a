"""Gated linear attention (Yang et al. 2312.06635).

  S_t = diag(alpha_t) S_{t-1} + k_t v_t^T     o_t = S_t^T q_t / sqrt(H)
  alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)   per key channel, rank 16

Keys are half as wide as values; the output is normalised per head and gated by
silu(W_g x). `conv_width` > 0 puts a short convolution before q, k and v.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import conv_taps
from efficient_attn.layers.param import LowRank
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import LINEAR, GatedOutput, Recurrent
from efficient_attn.values import (
  ChunkSize,
  NonNegative,
  Positive,
  PositiveFloat,
)


class GLA(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = LINEAR.taking(log_decay='BTNH')

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    expand_k: PositiveFloat = 0.5,
    expand_v: PositiveFloat = 1.0,
    gate_rank: Positive = 16,
    gate_temperature: PositiveFloat = 16.0,
    conv_width: NonNegative = 0,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    key_dim = int(expand_k * d_model / num_heads)
    value_dim = int(expand_v * d_model / num_heads)
    keys = (num_heads, key_dim)
    self.qkv = QKV(
      d_model,
      query=keys,
      key=keys,
      value=(num_heads, value_dim),
      conv_width=conv_taps(conv_width, causal),
      rngs=rngs,
    )
    heads = {'heads': num_heads, 'head_dim': key_dim}
    self.gate = LowRank(d_model, gate_rank, heads, bias=True, rngs=rngs)
    self.out = GatedOutput(
      d_model, num_heads, value_dim, eps=norm_eps, rngs=rngs
    )
    self.gate_temperature = gate_temperature
    self.sizes = dict(N=num_heads, H=key_dim, V=value_dim)
    self.options = dict(bidirectional=not causal, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    (q, k, v), tails = self.qkv(x, context, past.tails)
    gate = self.gate(x).astype(jnp.float32)
    log_decay = jax.nn.log_sigmoid(gate) / self.gate_temperature
    o, state = self.scan(context, past, q=q, k=k, v=v, log_decay=log_decay)
    return self.out(o, x), state, tails

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    return self.qkv.init_tails(batch, dtype)
