"""Random feature attention, RFA (Peng et al. 2103.02143).

  o_t = S_t^T phi(q_t) / (z_t . phi(q_t))     q, k of length 1
  S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T,  z_t the same of phi(k_t)
  phi(x) = [sin(w_i . x), cos(w_i . x)] / sqrt(m),  w_i = sigma * N(0, I)

phi(q) . phi(k) estimates exp(-|q - k|^2 / 2), which for vectors of length 1 is
exp(q . k) up to a constant. The normal vectors are drawn at init, per head,
and stay; the paper draws new ones at every step. sigma, per channel, is
learned. Without `gate` there are no factors g_t and 1 - g_t; with it (RFA-Gate)
g_t = sigmoid(w_g . x_t + b_g), per head. The estimate may be negative, and so
may a denominator of few features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.ops.recurrent import feature_maps
from efficient_attn.values import Positive


class RFA(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = KernelAttention.recurrence.taking(log_decay='BTN')

  def __init__(
    self,
    *,
    d_model: int,
    rngs: nnx.Rngs,
    nb_features: Positive = 64,
    gate: bool = False,
    **options,
  ):
    super().__init__(d_model=d_model, rngs=rngs, **options)
    heads, head_dim = self.heads
    normal = jax.random.normal(rngs.params(), (heads, nb_features, head_dim))
    axes = ('heads', 'features', 'head_dim')
    self.projection = param(normal, axes, weight_decay=False)
    self.sigma = param(jnp.ones(self.heads), ('heads', 'head_dim'))
    if gate:
      self.gate = Projection(
        {'embed': d_model}, {'heads': heads}, bias=True, rngs=rngs
      )
    else:
      self.gate = None

  def features(self, q, k, positions):
    """Returns phi(q), phi(k)."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    w = jax.lax.stop_gradient(value_of(self.projection, dtype))
    w = w * value_of(self.sigma, dtype)[:, None]
    return tuple(feature_maps.fourier(feature_maps.unit(x), w) for x in (q, k))

  def arrays(self, x, positions):
    """Returns the arguments of the op for the mixer's input."""
    arrays = super().arrays(x, positions)
    if self.gate is None:
      return arrays
    gate = self.gate(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    write = jax.nn.sigmoid(-gate).astype(x.dtype)[..., None]
    return arrays | dict(
      k=arrays['k'] * write, log_decay=jax.nn.log_sigmoid(gate)
    )
