"""Mamba (Gu and Dao, 2312.00752).

  x, z = W_in u, W_z u        x = silu(conv(x))
  dt = softplus(W_dt W_low x + b)     B, C = W_B x, W_C x
  h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t      y_t = C_t h_t + D x_t
  out = W_out (y * silu(z))

with A = -exp(A_log), 16 states per channel, twice as many channels as the
model is wide, and steps that start log-uniform in [1e-3, 1e-1]. Heads are
groups of channels that share nothing but dt's low rank, B and C.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.decay import time_step_bias
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import Convolved, Recurrence
from efficient_attn.ops.recurrent.selective_scan import selective_scan
from efficient_attn.values import ChunkSize, NonNegative, Positive


class Mamba(Convolved):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `dt_rank` 0 is a 16th of d_model, rounded up.
  """

  recurrence = Recurrence(
    selective_scan,
    dict(x='BTNH', dt='BTNH', A='NHS', B='BTS', C='BTS', D='NH'),
    state='BNHS',
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    expand: Positive = 2,
    d_state: Positive = 16,
    dt_rank: NonNegative = 0,
    conv_width: Positive = 4,
    discretization: str = 'euler',
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    heads = split_heads(expand * d_model, num_heads)
    shape = tuple(heads.values())
    rank = dt_rank or -(-d_model // 16)
    self.value = Projection({'embed': d_model}, heads, rngs=rngs)
    self.gate = Projection({'embed': d_model}, heads, rngs=rngs)
    self.conv = ShortConv(heads, conv_width, bias=True, rngs=rngs)
    self.select = Projection(heads, {'rank': rank + 2 * d_state}, rngs=rngs)
    self.dt = Projection({'rank': rank}, heads, rngs=rngs, init=_uniform)
    self.dt_bias = param(
      time_step_bias(rngs.params(), shape), (*heads,), weight_decay=False
    )
    states = jnp.broadcast_to(jnp.arange(1.0, d_state + 1), (*shape, d_state))
    self.a_log = param(jnp.log(states), (*heads, None), weight_decay=False)
    self.skip = param(jnp.ones(shape), (*heads,), weight_decay=False)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)
    self.sizes = dict(N=shape[0], H=shape[1], S=d_state)
    self.splits = (rank, rank + d_state)
    self.options = dict(discretization=discretization, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    value, tail = self.convolve(self.value(x), context, past)
    low, B, C = jnp.split(self.select(value), self.splits, -1)
    dt = self.dt(low).astype(jnp.float32) + value_of(self.dt_bias, jnp.float32)
    y, state = self.scan(
      context,
      past,
      x=value,
      dt=jax.nn.softplus(dt),
      A=-jnp.exp(value_of(self.a_log, jnp.float32)),
      B=B,
      C=C,
      D=value_of(self.skip, jnp.float32),
    )
    return self.out(y * jax.nn.silu(self.gate(x))), state, tail


def _uniform(key, shape, fan_in):
  bound = 1 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
