"""RWKV-7 "Goose" time mixing (Peng et al. 2503.14456).

  S_t = S_{t-1} diag(w_t) - S_{t-1} kappa_t (a_t * kappa_t)^T + v_t k'_t^T

in the paper's value x key layout; ours is its transpose. kappa_t is the
normalised removal key, a_t in (0, 1) the in-context learning rate,
k'_t = k_t * (1 + (a_t - 1) * k_a) the replacement key and
log w_t = -exp(-1/2) sigmoid(.), so that no channel decays below 0.545. The
output o_t = S_t r_t is normalised per head, gets the bonus
(r_t . (r_k * k'_t)) v_t and is gated.

Every input of a projection is mixed with the token before it. The value
residual from the first layer is not part of a mixer and is left out.

Biases, shares, strengths and low ranks start as in RWKV-LM, other matrices and
the norm as everywhere here. `depth` is the place of the layer in its model, 0
for the first and 1 for the last, where RWKV-LM takes l / L or l / (L - 1) for
layer l. As there, `norm_eps` is 64e-5 for heads of any width; fla takes 1e-5
for each channel of a head.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.head_norm import HeadLayerNorm
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import LowRank, Projection, param, value_of
from efficient_attn.layers.recurrence import DPLR
from efficient_attn.layers.token_shift import Shifted
from efficient_attn.values import ChunkSize, Fraction, Positive, PositiveFloat

# What is mixed, and how fast the share of the token before falls over channels.
INPUTS = {'r': 0.2, 'w': 0.9, 'k': 0.7, 'v': 0.7, 'a': 0.9, 'g': 0.2}


class RWKV7(Shifted):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = DPLR.taking(log_decay='BTNH')

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    decay_rank: Positive = 64,
    rate_rank: Positive = 64,
    gate_rank: Positive = 128,
    depth: Fraction = 0.5,
    norm_eps: PositiveFloat = 64e-5,
    chunk_size: ChunkSize = 64,
  ):
    heads = split_heads(d_model, num_heads)
    width = heads['head_dim']
    d_in = {'embed': d_model}
    channel = jnp.arange(d_model)
    line = channel / max(d_model - 1, 1)
    zigzag = 2 * (channel % width) / max(width - 1, 1) - 1  # -1 to 1 in a head
    zigzag = zigzag * jnp.abs(zigzag)
    powers = jnp.array(list(INPUTS.values()))[:, None] * (1 - depth)
    self.mix = param(1 - (channel / d_model) ** powers, (None, None))
    self.receptance = Projection(d_in, heads, rngs=rngs)
    self.key = Projection(d_in, heads, rngs=rngs)
    self.value = Projection(d_in, heads, rngs=rngs)
    self.decay, self.rate, self.gate = (
      LowRank(
        d_model,
        rank,
        heads,
        activation=activation,
        inits=(_zeros, _orthogonal),
        rngs=rngs,
      )
      for rank, activation in (
        (decay_rank, jnp.tanh),
        (rate_rank, None),
        (gate_rank, jax.nn.sigmoid),
      )
    )

    def per_channel(value):
      value = jnp.broadcast_to(value, (d_model,)).reshape(num_heads, width)
      return param(value, (*heads,), weight_decay=False)

    decay = -6 + 6 * line ** (1 + depth**0.3)  # from slow to fast
    self.decay_bias = per_channel(decay + 0.5 + 2.5 * zigzag)
    self.rate_bias = per_channel(-0.19 + 0.3 * zigzag + 0.4 * (line - 0.5))
    self.removal = per_channel(0.71 - 0.1 * (line - 0.5))
    self.replacement = per_channel(1.02)
    self.bonus = per_channel(-0.04)
    self.norm = HeadLayerNorm(num_heads, width, eps=norm_eps)
    self.out = Projection(heads, d_in, rngs=rngs)
    self.d_model = d_model
    self.sizes = dict(N=num_heads, H=width, V=width)
    self.options = dict(
      scale=1.0, bidirectional=not causal, chunk_size=chunk_size
    )

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    previous, last = self.shifted(x, context, past)
    mix = value_of(self.mix, x.dtype)
    inputs = {
      name: x + (previous - x) * mix[i] for i, name in enumerate(INPUTS)
    }
    r = self.receptance(inputs['r'])
    k = self.key(inputs['k'])
    v = self.value(inputs['v'])

    def biased(projection, bias, name):
      bias = value_of(bias, jnp.float32)
      return projection(inputs[name]).astype(jnp.float32) + bias

    decay = jax.nn.sigmoid(biased(self.decay, self.decay_bias, 'w'))
    rate = jax.nn.sigmoid(biased(self.rate, self.rate_bias, 'a'))
    rate = rate.astype(x.dtype)
    removal = l2_normalize(k * value_of(self.removal, x.dtype))
    k = k * (1 + (rate - 1) * value_of(self.replacement, x.dtype))
    o, state = self.scan(
      context,
      past,
      q=r,
      k=k,
      v=v,
      a=-removal,
      b=removal * rate,
      log_decay=-math.exp(-0.5) * decay,
    )
    bonus = jnp.sum(r * k * value_of(self.bonus, x.dtype), -1, keepdims=True)
    y = (self.norm(o) + bonus * v) * self.gate(inputs['g'])
    return self.out(y), state, last


def _zeros(key, shape, fan_in):
  return jnp.zeros(shape)


def _orthogonal(key, shape, fan_in):
  """Rows of length 0.1 at right angles; columns, where those are fewer."""
  outputs = math.prod(shape) // fan_in
  scale = 0.1 * max(1, fan_in / outputs) ** 0.5
  init = jax.nn.initializers.orthogonal(scale)
  return init(key, (fan_in, outputs)).reshape(shape)
