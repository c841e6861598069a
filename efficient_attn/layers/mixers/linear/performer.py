"""Performer, attention by FAVOR+ random features (Choromanski 2009.14794).

  o_t = sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s)
  phi(x)_i = exp(w_i . y - |y|^2 / 2) / sqrt(m)
  w_i ~ N(0, I),  y = x / H^(1/4)

estimates softmax attention with scores q . k / sqrt(H) without bias, with an
error of order 1 / sqrt(m). `nb_features` m is H log H by default. The w_i are
orthogonal in blocks of H, drawn at init, not redrawn and not trained. Nothing
is added to the features; the authors' code adds eps = 1e-4 to each.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.layers.param import param, value_of
from efficient_attn.ops.recurrent import feature_maps
from efficient_attn.values import NonNegative


class Performer(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    rngs: nnx.Rngs,
    nb_features: NonNegative = 0,
    hyperbolic: bool = False,
    **options,
  ):
    super().__init__(rngs=rngs, **options)
    head_dim = self.heads[1]
    nb_features = nb_features or max(1, int(head_dim * math.log(head_dim)))
    projection = feature_maps.orthogonal_projection(
      rngs.params(), nb_features, head_dim
    )
    axes = ('features', 'head_dim')
    self.projection = param(projection, axes, weight_decay=False)
    self.hyperbolic = hyperbolic

  def features(self, q, k, positions):
    """Returns phi(q), up to a factor per query, and phi(k)."""
    w = jax.lax.stop_gradient(value_of(self.projection, jnp.float32))
    scale = self.heads[1] ** -0.25
    phi = functools.partial(
      feature_maps.positive_random, projection=w, hyperbolic=self.hyperbolic
    )
    return phi(q * scale, shift=True), phi(k * scale)
