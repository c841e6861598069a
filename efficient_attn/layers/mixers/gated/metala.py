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
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import Projection, param, use
from efficient_attn.layers.recurrence import run_op
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.values import ChunkSize, Positive, PositiveFloat


class MetaLA(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

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
    self.state_shape = (num_heads, key_dim, value_dim)
    self.chunk_size = chunk_size

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    x, tail = self.conv(
      x, segment_ids=context.segment_ids, state=cache and cache['conv']
    )
    logits = self.decay(x).astype(jnp.float32)
    log_decay = jax.nn.log_sigmoid(logits) / self.gate_temperature
    q, v = self.query(x), self.value(x)
    k = -jnp.expm1(log_decay)
    o, state = run_op(
      linear_attention,
      dict(q=q, k=k.astype(x.dtype), v=v, log_decay=log_decay),
      segment_ids=context.segment_ids,
      state=cache and cache['state'],
      chunk_size=self.chunk_size,
    )
    own = jnp.sum(q * k * use(self.augment, k.dtype), -1, keepdims=True)
    o = self.norm(o + jax.nn.sigmoid(own * v).astype(o.dtype))
    if cache is not None:
      cache = dict(state=state, conv=tail)
    return self.out(o * jax.nn.silu(self.gate(x))), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state; `max_len` does not matter."""
    state = jnp.zeros((batch, *self.state_shape))
    return dict(state=state, conv=self.conv.init_state(batch, dtype))
