"""CHELA, short-long convolutions with linear attention (Liu 2406.08128).

  Z = K_long * silu(K_short * X)
  Q = a_q Z + b_q,   K = a_k Z + b_k,   V = silu(X W_v + c_v)
  S_t = S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(H)
  y = W_o (norm(o) * silu(Z W_g + c_g))

Both convolutions are causal and depthwise, a and b vectors. The paper leaves
the parameters of the long kernel open. Here it is a mixture of exponentials,

  K_long[t] = sum_{i < n} w_i (1 - a_i) a_i^t,   a_i = exp(-exp(rate_i)),

per channel: as long as the sequence, O(T n) to apply, and a state of n numbers
per channel where a free kernel would keep all inputs. Spans 1 / exp(rate) start
between 1 and 1024 tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  value_of,
)
from efficient_attn.layers.recurrence import DIAGONAL, LINEAR, Recurrent
from efficient_attn.values import ChunkSize, Positive

LONG = DIAGONAL.taking(log_decay='NH')


class Chela(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = LINEAR

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    short_width: Positive = 4,
    exponentials: Positive = 4,
    chunk_size: ChunkSize = 64,
  ):
    d_in, inner = {'embed': d_model}, split_heads(d_model, num_heads)
    names, heads = tuple(inner), tuple(inner.values())
    self.heads = heads
    self.short = ShortConv(inner, short_width, rngs=rngs)
    shape = (*heads, exponentials)
    rates = -jnp.linspace(0, np.log(1024.0), exponentials)
    self.rates = param(
      jnp.broadcast_to(rates, shape), (*names, None), weight_decay=False
    )
    mixture = fan_in_normal()(rngs.params(), shape, exponentials)
    self.mixture = param(mixture, (*names, None), weight_decay=False)
    # a_q and a_k, b_q and b_k.
    self.scale = param(jnp.ones((2, *heads)), (None, *names))
    self.shift = param(jnp.zeros((2, *heads)), (None, *names))
    self.value = Projection(d_in, inner, bias=True, rngs=rngs)
    self.gate = Projection(d_in, inner, bias=True, rngs=rngs)
    self.norm = RMSNorm(heads[1])
    self.out = Projection(inner, d_in, rngs=rngs)
    self.options = dict(chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    long, memory = past.state or (None, None)
    z, tail = self.short(
      x.reshape(*x.shape[:2], *self.heads),
      segment_ids=context.segment_ids,
      state=past.tails,
    )
    z, long = self.long_conv(z, context.segment_ids, long)
    scale, shift = value_of(self.scale, x.dtype), value_of(self.shift, x.dtype)
    o, memory = self.scan(
      context,
      past.replace(state=memory),
      q=z * scale[0] + shift[0],
      k=z * scale[1] + shift[1],
      v=jax.nn.silu(self.value(x)),
    )
    z = sharding.constrain(z, 'batch', None, None, None).reshape(x.shape)
    y = self.out(self.norm(o) * jax.nn.silu(self.gate(z)))
    return y, (long, memory), tail

  def long_conv(self, u, segment_ids, state):
    """Returns K_long * u for heads u [B, T, N, H], and the last averages."""
    log_decay = -jnp.exp(value_of(self.rates, jnp.float32))
    inputs = u[..., None] * -jnp.expm1(log_decay).astype(u.dtype)
    arrays = dict(
      x=inputs.reshape(*u.shape[:3], -1),
      log_decay=log_decay.reshape(self.heads[0], -1),
    )
    averages, state = LONG(
      arrays, segment_ids=segment_ids, state=state, **self.options
    )
    averages = averages.reshape(inputs.shape)
    return jnp.sum(averages * value_of(self.mixture, u.dtype), -1), state

  def init_state(self, batch, max_len, dtype):
    """Returns the averages and the memory before the first token, zeros."""
    n, h = self.heads
    averages = LONG.zeros(batch, dict(N=n, H=h * self.rates.shape[-1]))
    return averages, LINEAR.zeros(batch, dict(N=n, H=h, V=h))

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    return self.short.init_state(batch, dtype)
