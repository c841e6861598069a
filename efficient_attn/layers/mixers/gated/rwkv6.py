"""RWKV-6 "Finch" (Peng et al. 2404.05892): RWKV-5 with data-dependent gates.

  S_t = diag(w_t) S_{t-1} + k_t v_t^T
  o_t = S_{t-1}^T r_t + (r_t . (u * k_t)) v_t
  w_t = exp(-exp(w_0 + tanh(w'_t A_w) B_w))     per key channel, rank 64

The mixture of x_t and x_{t-1} that goes into i = r, k, v, g and w' is itself
interpolated by the data, with a rank of 32:

  i_t = x_t + (x_{t-1} - x_t) * (mu_i + tanh(x'_t A_i) B_i)
  x'_t = x_t + (x_{t-1} - x_t) * mu_x
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers.gated.rwkv5 import RWKV5, shift_init
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.values import Positive


class RWKV6(RWKV5):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = RWKV5.recurrence.taking(log_decay='BTNH')

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    rngs: nnx.Rngs,
    shift_rank: Positive = 32,
    decay_rank: Positive = 64,
    **options,
  ):
    super().__init__(d_model=d_model, num_heads=num_heads, rngs=rngs, **options)
    inputs = {'embed': d_model}
    self.shifts = param(
      jnp.stack([shift_init(d_model, name) for name in 'xrkvgw']),
      (None, 'embed'),
    )
    # As published, A starts at zero and B is small and uniform.
    self.shift_down = Projection(
      inputs, {'kinds': 5, 'rank': shift_rank}, init=_zeros, rngs=rngs
    )
    shape = (5, shift_rank, d_model)
    up = jax.random.uniform(rngs.params(), shape, minval=-0.01, maxval=0.01)
    self.shift_up = param(up, (None, None, 'embed'), weight_decay=True)
    self.decay_down = Projection(
      inputs, {'rank': decay_rank}, init=_zeros, rngs=rngs
    )
    heads = {'heads': num_heads, 'head_dim': d_model // num_heads}
    self.decay_up = Projection(
      {'rank': decay_rank}, heads, init=_small, rngs=rngs
    )

  def inputs(self, x, delta):
    """Returns the inputs of r, k, v and g, and the log decays."""
    shifts = value_of(self.shifts, x.dtype)
    low = jnp.tanh(self.shift_down(x + delta * shifts[0]))
    moves = jnp.einsum('btir,ird->btid', low, value_of(self.shift_up, x.dtype))
    moves = moves + shifts[1:]
    *mixed, w = (x + delta * moves[:, :, i] for i in range(5))
    w = self.decay_up(jnp.tanh(self.decay_down(w))).astype(jnp.float32)
    return *mixed, -jnp.exp(value_of(self.decay, jnp.float32) + w)


def _zeros(key, shape, fan_in):
  return jnp.zeros(shape)


def _small(key, shape, fan_in):
  return jax.random.uniform(key, shape, minval=-0.01, maxval=0.01)
