"""The recurrent block of Griffin (De et al. 2402.19427).

  r_t = sigmoid(W_r x_t + b_r)      i_t = sigmoid(W_i x_t + b_i)
  a_t = a^(c r_t),  a = sigmoid(Lambda),  c = 8
  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * x_t)

on one linear branch after a convolution of 4 tokens; the other branch passes a
GELU and multiplies the output. The gates are block diagonal, one block per
head. a^c starts uniform in [0.9, 0.999], as in the paper; recurrentgemma draws
a, uniform by area, has biases, and does not scale the first token of a
sequence: h_1 = i_1 * x_1 (`scale_first=False`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.cache import RecurrentCache, new_cursor
from efficient_attn.layers.context import Context
from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.headwise import Headwise
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import DIAGONAL, Convolved
from efficient_attn.ops.recurrent.selective_scan import expm1_ratio
from efficient_attn.values import ChunkSize, Positive, PositiveFloat

C = 8.0


class RGLRU(Convolved):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = DIAGONAL.taking(log_decay='BTNH')

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    expand: PositiveFloat = 4 / 3,
    conv_width: Positive = 4,
    in_bias: bool = False,
    out_bias: bool = False,
    scale_first: bool = True,
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    shape = (num_heads, int(expand * d_model / num_heads))
    heads = {'heads': shape[0], 'head_dim': shape[1]}
    embed = {'embed': d_model}
    self.value = Projection(embed, heads, bias=in_bias, rngs=rngs)
    self.gate = Projection(embed, heads, bias=in_bias, rngs=rngs)
    self.conv = ShortConv(
      heads, conv_width, bias=True, activation=None, rngs=rngs
    )
    self.recurrence_gate = Headwise(*shape, bias=True, rngs=rngs)
    self.input_gate = Headwise(*shape, bias=True, rngs=rngs)
    decay = jax.random.uniform(rngs.params(), shape, minval=0.9, maxval=0.999)
    # softplus(rate) = -log(a), so that a = sigmoid(-rate).
    rate = jnp.log(jnp.expm1(-jnp.log(decay) / C))
    self.rate = param(rate, (*heads,), weight_decay=False)
    self.out = Projection(heads, embed, bias=out_bias, rngs=rngs)
    self.counts = not scale_first
    self.sizes = dict(N=shape[0], H=shape[1])
    self.options = dict(chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    value, tail = self.convolve(self.value(x), context, past)
    r = self.recurrence_gate(value).astype(jnp.float32)
    i = jax.nn.sigmoid(self.input_gate(value).astype(jnp.float32))
    rate = C * jax.nn.softplus(value_of(self.rate, jnp.float32))
    log_decay = -rate * jax.nn.sigmoid(r)
    # sqrt(1 - a^2) in factors: exact for a near 1, and with a finite gradient
    # where the gate is shut (sigmoid(r) = 0, a = 1).
    scale = jnp.sqrt(2 * rate * expm1_ratio(2 * log_decay))
    scale = scale * jnp.exp(jax.nn.log_sigmoid(r) / 2)
    if self.counts:
      scale = jnp.where(_first_tokens(x, context, past), 1, scale)
    h, state = self.scan(
      context,
      past,
      x=scale * i * value.astype(jnp.float32),
      log_decay=log_decay,
    )
    y = self.out(h.astype(x.dtype) * jax.nn.gelu(self.gate(x)))
    return y, state, tail


def _first_tokens(x, context: Context, past: RecurrentCache) -> jax.Array:
  """Tells which of the tokens x [B, T, D] begin a sequence, [B|1, T, 1, 1]."""
  cursor = past.cursor or new_cursor()
  places = cursor.length + jnp.arange(x.shape[1])
  starts = cursor.starts(context, x.shape[1])
  first = places == (0 if starts is None else starts)
  return jnp.atleast_2d(first)[..., None, None]
