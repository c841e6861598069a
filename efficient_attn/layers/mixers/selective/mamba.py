"""Mamba (Gu and Dao, 2312.00752).

  x, z = W_in u, W_z u        x = silu(conv(x))
  dt = softplus(W_dt W_low x + b)     B, C = W_B x, W_C x
  h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t      y_t = C_t h_t + D x_t
  out = W_out (y * silu(z))

with A = -exp(A_log), 16 states per channel, twice as many channels as the
model is wide, and steps that start log-uniform in [1e-3, 1e-1]. Heads are
groups of channels that share nothing but dt's low rank, B and C. These three
are normalised in Jamba (`select_norm='scaled'`) and, without a learned scale,
in Falcon-Mamba ('plain').
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.decay import time_step_bias
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import Convolved, Recurrence
from efficient_attn.ops.recurrent.selective_scan import selective_scan
from efficient_attn.values import (
  ChunkSize,
  NonNegative,
  OneOf,
  Positive,
  PositiveFloat,
)


class Mamba(Convolved):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `dt_rank` 0 is a 16th of d_model, rounded up; `norm_eps` is that of
  `select_norm`.
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
    conv_bias: bool = True,
    in_bias: bool = False,
    out_bias: bool = False,
    select_norm: Annotated[str, OneOf(('none', 'plain', 'scaled'))] = 'none',
    norm_eps: PositiveFloat = 1e-6,
    discretization: str = 'euler',
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    heads = split_heads(expand * d_model, num_heads)
    shape = tuple(heads.values())
    rank = dt_rank or -(-d_model // 16)
    embed = {'embed': d_model}
    self.value = Projection(embed, heads, bias=in_bias, rngs=rngs)
    self.gate = Projection(embed, heads, bias=in_bias, rngs=rngs)
    self.conv = ShortConv(heads, conv_width, bias=conv_bias, rngs=rngs)
    self.select = Projection(heads, {'rank': rank + 2 * d_state}, rngs=rngs)
    self.dt = Projection({'rank': rank}, heads, rngs=rngs, init=_uniform)
    self.dt_bias = param(
      time_step_bias(rngs.params(), shape), (*heads,), weight_decay=False
    )
    states = jnp.broadcast_to(jnp.arange(1.0, d_state + 1), (*shape, d_state))
    self.a_log = param(jnp.log(states), (*heads, None), weight_decay=False)
    self.skip = param(jnp.ones(shape), (*heads,), weight_decay=False)
    if select_norm != 'none':
      self.select_norms = nnx.List(
        RMSNorm(width, eps=norm_eps, learned=select_norm == 'scaled')
        for width in (rank, d_state, d_state)
      )
    self.select_norm, self.norm_eps = select_norm, norm_eps
    self.out = Projection(heads, embed, bias=out_bias, rngs=rngs)
    self.sizes = dict(N=shape[0], H=shape[1], S=d_state)
    self.splits = (rank, rank + d_state)
    self.options = dict(discretization=discretization, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    value, tail = self.convolve(self.value(x), context, past)
    low, B, C = self.selected(value)
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

  def selected(self, value):
    """Returns dt's low rank, B and C, [B, T, rank] and twice [B, T, S]."""
    parts = jnp.split(self.select(value), self.splits, -1)
    if self.select_norm == 'none':
      return parts
    return [norm(a) for norm, a in zip(self.select_norms, parts, strict=True)]


def _uniform(key, shape, fan_in):
  bound = 1 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
