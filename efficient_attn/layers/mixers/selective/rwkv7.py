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
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.head_norm import HeadLayerNorm
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.padding import without_padding
from efficient_attn.layers.param import LowRank, Projection, param, use
from efficient_attn.layers.recurrence import run_op
from efficient_attn.layers.token_shift import token_shift
from efficient_attn.ops.recurrent.dplr import dplr
from efficient_attn.values import ChunkSize, Positive, PositiveFloat

INPUTS = ('r', 'w', 'k', 'v', 'a', 'g')


class RWKV7(nnx.Module):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

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
    norm_eps: PositiveFloat = 64e-5,
    chunk_size: ChunkSize = 64,
  ):
    width = d_model // num_heads
    heads = {'heads': num_heads, 'head_dim': width}
    d_in = {'embed': d_model}
    self.mix = param(jnp.full((len(INPUTS), d_model), 0.5), (None, None))
    self.receptance = Projection(d_in, heads, rngs=rngs)
    self.key = Projection(d_in, heads, rngs=rngs)
    self.value = Projection(d_in, heads, rngs=rngs)
    self.decay = LowRank(
      d_model, decay_rank, heads, activation=jnp.tanh, rngs=rngs
    )
    self.rate = LowRank(d_model, rate_rank, heads, rngs=rngs)
    self.gate = LowRank(
      d_model, gate_rank, heads, activation=jax.nn.sigmoid, rngs=rngs
    )
    # Decays from slow to fast over the channels of a head, as published.
    ramp = jnp.linspace(0, 1, width)
    axes = ('heads', 'head_dim')

    def per_channel(value):
      value = jnp.broadcast_to(value, (num_heads, width))
      return param(value, axes, weight_decay=False)

    self.decay_bias = per_channel(-6.0 + 5.0 * ramp**0.85 + 0.5)
    self.rate_bias = per_channel(0.0)
    self.removal = per_channel(0.85)
    self.replacement = per_channel(1.0)
    self.bonus = per_channel(0.0)
    self.norm = HeadLayerNorm(num_heads, width, eps=norm_eps)
    self.out = Projection(heads, d_in, rngs=rngs)
    self.d_model = d_model
    self.state_shape = (num_heads, width, width)
    self.options = dict(bidirectional=not causal, chunk_size=chunk_size)

  def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
    """Mixes tokens; see `layers.mixers` for the contract."""
    x = without_padding(x, segment_ids)
    previous, last = token_shift(
      x, segment_ids=segment_ids, state=cache and cache['token']
    )
    mix = use(self.mix, x.dtype)
    inputs = {
      name: x + (previous - x) * mix[i] for i, name in enumerate(INPUTS)
    }
    r = self.receptance(inputs['r'])
    k = self.key(inputs['k'])
    v = self.value(inputs['v'])

    def biased(projection, bias, name):
      bias = use(bias, jnp.float32)
      return projection(inputs[name]).astype(jnp.float32) + bias

    decay = jax.nn.sigmoid(biased(self.decay, self.decay_bias, 'w'))
    rate = jax.nn.sigmoid(biased(self.rate, self.rate_bias, 'a'))
    rate = rate.astype(x.dtype)
    removal = l2_normalize(k * use(self.removal, x.dtype))
    k = k * (1 + (rate - 1) * use(self.replacement, x.dtype))
    o, state = run_op(
      dplr,
      dict(
        q=r,
        k=k,
        v=v,
        a=-removal,
        b=removal * rate,
        log_decay=-math.exp(-0.5) * decay,
      ),
      segment_ids=segment_ids,
      state=cache and cache['state'],
      scale=1.0,
      **self.options,
    )
    bonus = jnp.sum(r * k * use(self.bonus, x.dtype), -1, keepdims=True)
    y = (self.norm(o) + bonus * v) * self.gate(inputs['g'])
    if cache is not None:
      cache = dict(state=state, token=last)
    return self.out(y), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state; `max_len` does not matter."""
    return dict(
      state=jnp.zeros((batch, *self.state_shape)),
      token=jnp.zeros((batch, self.d_model), dtype),
    )
