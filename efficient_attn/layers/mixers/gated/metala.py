"""MetaLA (Chou et al. 2411.10741): gates alone, without keys.

  S_t = diag(alpha_t) S_{t-1} + (1 - alpha_t) v_t^T
  o_t = S_t^T q_t / sqrt(H) + sigmoid((q_t . (w * (1 - alpha_t))) v_t)
  alpha_t = sigmoid(W_a x_t)^(1/16)     per key channel

x passes through a short causal convolution before all projections; keys are
half as wide as values; the second term is the self-augmentation, w starts at
zero. The output is normalised per head and gated by silu(W_g x + b).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.head_norm import HeadLayerNorm
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import LINEAR, Convolved
from efficient_attn.values import ChunkSize, Positive, PositiveFloat


class MetaLA(Convolved):
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
    gate_temperature: PositiveFloat = 16.0,
    conv_width: Positive = 4,
    chunk_size: ChunkSize = 64,
  ):
    key_dim = int(expand_k * d_model / num_heads)
    value_dim = d_model // num_heads
    inputs = {'embed': d_model}
    keys = {'heads': num_heads, 'head_dim': key_dim}
    values = {'heads': num_heads, 'head_dim': value_dim}
    # One convolution for all heads: its channels are not sharded.
    self.conv = ShortConv(
      {'channels': d_model}, conv_width, bias=True, rngs=rngs
    )
    self.query = Projection(inputs, keys, rngs=rngs)
    self.decay = Projection(inputs, keys, rngs=rngs)
    self.value = Projection(inputs, values, rngs=rngs)
    self.gate = Projection(inputs, values, bias=True, rngs=rngs)
    self.augment = param(jnp.zeros((num_heads, key_dim)), (*keys,))
    self.norm = HeadLayerNorm(num_heads, value_dim)
    self.out = Projection(values, inputs, rngs=rngs)
    self.gate_temperature = gate_temperature
    self.sizes = dict(N=num_heads, H=key_dim, V=value_dim)
    self.options = dict(chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    x, tail = self.convolve(x, context, past)
    logits = self.decay(x).astype(jnp.float32)
    log_decay = jax.nn.log_sigmoid(logits) / self.gate_temperature
    q, v = self.query(x), self.value(x)
    k = -jnp.expm1(log_decay)
    o, state = self.scan(
      context, past, q=q, k=k.astype(x.dtype), v=v, log_decay=log_decay
    )
    own = jnp.sum(q * k * value_of(self.augment, k.dtype), -1, keepdims=True)
    o = self.norm(o + jax.nn.sigmoid(own * v).astype(o.dtype))
    return self.out(o * jax.nn.silu(self.gate(x))), state, tail
