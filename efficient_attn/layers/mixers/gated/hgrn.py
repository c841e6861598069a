"""HGRN, the hierarchically gated recurrent network (Qin et al. 2311.04823).

  c_t = silu(W_c x_t)                         complex, D channels
  lambda_t = gamma + (1 - gamma) sigmoid(W_f x_t)
  h_t = lambda_t exp(i theta) h_{t-1} + (1 - lambda_t) c_t
  y_t = W_o (norm([Re h_t, Im h_t]) * silu(W_g x_t))

gamma is the lower bound of the layer; in the paper it grows from 0 in the
first layer towards 1. The angle theta is the same for all tokens, so with
h_t = exp(i theta t) z_t the real and the imaginary part of z are two real
recurrences: the input is turned back by theta t, the state forth.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.norm import LayerNorm
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import DIAGONAL, Recurrent
from efficient_attn.values import BelowOne, ChunkSize, PositiveFloat


class HGRN(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = DIAGONAL.taking(log_decay='BTNH')
  counts = True

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    lower_bound: BelowOne = 0.0,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    heads = split_heads(d_model, num_heads)
    shape, embed = tuple(heads.values()), {'embed': d_model}
    self.real, self.imaginary, self.forget = (
      Projection(embed, heads, bias=True, rngs=rngs) for _ in range(3)
    )
    index = jnp.arange(d_model).reshape(shape)
    theta = 10000.0 ** (-2 / d_model * index)
    self.theta = param(theta, (*heads,), weight_decay=False)
    both = {'channels': 2 * d_model}
    self.gate = Projection(embed, both, bias=True, rngs=rngs)
    self.norm = LayerNorm(2 * d_model, eps=norm_eps)
    self.out = Projection(both, embed, bias=True, rngs=rngs)
    self.lower_bound = lower_bound
    self.sizes = dict(N=shape[0], H=2 * shape[1])
    self.options = dict(chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    # Tokens turn one by one, whatever their positions are.
    turns = jnp.arange(x.shape[1])
    if past.cursor is not None:
      turns = past.cursor.length + turns
    angle = turns[:, None, None] * value_of(self.theta, jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    forget = self.forget(x).astype(jnp.float32)
    new = (1 - self.lower_bound) * jax.nn.sigmoid(-forget)  # 1 - lambda
    a = new * jax.nn.silu(self.real(x).astype(jnp.float32))
    b = new * jax.nn.silu(self.imaginary(x).astype(jnp.float32))
    log_decay = jax.nn.log_sigmoid(forget)
    if self.lower_bound:
      log_decay = jnp.logaddexp(
        math.log(self.lower_bound), math.log1p(-self.lower_bound) + log_decay
      )
    z, state = self.scan(
      context,
      past,
      x=jnp.concatenate([a * cos + b * sin, b * cos - a * sin], -1),
      log_decay=jnp.concatenate([log_decay, log_decay], -1),
    )
    a, b = jnp.split(z, 2, -1)
    h = jnp.stack([a * cos - b * sin, a * sin + b * cos], 2)
    h = sharding.constrain(h.astype(x.dtype), 'batch', *[None] * 4)
    h = self.norm(h.reshape(*x.shape[:2], -1))
    return self.out(h * jax.nn.silu(self.gate(x))), state, None
