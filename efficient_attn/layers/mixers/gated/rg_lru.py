"""The recurrent block of Griffin (De et al. 2402.19427).

  r_t = sigmoid(W_r x_t + b_r)      i_t = sigmoid(W_i x_t + b_i)
  a_t = a^(c r_t),  a = sigmoid(Lambda),  c = 8
  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * x_t)

on one linear branch after a convolution of 4 tokens; the other branch passes a
GELU and multiplies the output. The gates are block diagonal, one block per
head. a^c starts uniform in [0.9, 0.999], as in the paper; recurrentgemma draws
a, uniform by area, and does not scale the first token of a sequence.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.headwise import Headwise
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import Projection, param, use
from efficient_attn.layers.recurrence import run_op
from efficient_attn.ops.recurrent.diagonal_scan import diagonal_scan
from efficient_attn.ops.recurrent.selective_scan import expm1_ratio
from efficient_attn.values import ChunkSize, Positive, PositiveFloat

C = 8.0


class RGLRU(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    expand: PositiveFloat = 4 / 3,
    conv_width: Positive = 4,
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    shape = (num_heads, int(expand * d_model / num_heads))
    heads = {'heads': shape[0], 'head_dim': shape[1]}
    self.value = Projection({'embed': d_model}, heads, rngs=rngs)
    self.gate = Projection({'embed': d_model}, heads, rngs=rngs)
    self.conv = ShortConv(
      heads, conv_width, bias=True, activation=None, rngs=rngs
    )
    self.recurrence_gate = Headwise(*shape, bias=True, rngs=rngs)
    self.input_gate = Headwise(*shape, bias=True, rngs=rngs)
    decay = jax.random.uniform(rngs.params(), shape, minval=0.9, maxval=0.999)
    # softplus(rate) = -log(a), so that a = sigmoid(-rate).
    rate = jnp.log(jnp.expm1(-jnp.log(decay) / C))
    self.rate = param(rate, (*heads,), weight_decay=False)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)
    self.shape = shape
    self.chunk_size = chunk_size

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    value, tail = self.conv(
      self.value(x),
      segment_ids=context.segment_ids,
      state=cache and cache['conv'],
    )
    r = self.recurrence_gate(value).astype(jnp.float32)
    i = jax.nn.sigmoid(self.input_gate(value).astype(jnp.float32))
    rate = C * jax.nn.softplus(use(self.rate, jnp.float32))
    log_decay = -rate * jax.nn.sigmoid(r)
    # sqrt(1 - a^2) in factors: exact for a near 1, and with a finite gradient
    # where the gate is shut (sigmoid(r) = 0, a = 1).
    scale = jnp.sqrt(2 * rate * expm1_ratio(2 * log_decay))
    scale = scale * jnp.exp(jax.nn.log_sigmoid(r) / 2)
    h, state = run_op(
      diagonal_scan,
      dict(x=scale * i * value.astype(jnp.float32), log_decay=log_decay),
      segment_ids=context.segment_ids,
      state=cache and cache['state'],
      chunk_size=self.chunk_size,
    )
    if cache is not None:
      cache = dict(state=state, conv=tail)
    return self.out(h.astype(x.dtype) * jax.nn.gelu(self.gate(x))), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state; `max_len` does not matter."""
    state = jnp.zeros((batch, *self.shape))
    return dict(state=state, conv=self.conv.init_state(batch, dtype))
