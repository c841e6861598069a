"""Quadratic Taylor attention of QT-ViT (Xu et al., NeurIPS 2024).

  exp(q . k / sqrt(H)) ~ 1 + q . k / sqrt(H) + (q . k)^2 / (2 H)

The exact features of the right side are H (H + 3) / 2 + 1 wide and cost O(H^3)
per token (`compact=False`). The published map keeps only the squares,

  phi(x) = [alpha x_i^2, beta (4 / H)^(1/4) x_i, gamma]   2 H + 1 wide, O(H^2),

with learned alpha, beta, gamma. They start at 1, where phi(q) . phi(k) >=
sum_i (q_i k_i + 1 / sqrt(H))^2 is not negative.
"""

import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.layers.param import param, value_of
from efficient_attn.ops.recurrent import feature_maps


class QTViT(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, *, compact: bool = True, **options):
    super().__init__(**options)
    scalars = 3 if compact else 0
    self.scalars = nnx.List(param(jnp.ones(()), ()) for _ in range(scalars))

  def features(self, q, k, positions):
    """Returns phi(q), phi(k)."""
    if self.scalars:
      scalars = [value_of(scalar, q.dtype) for scalar in self.scalars]
      return tuple(feature_maps.taylor_diagonal(x, *scalars) for x in (q, k))
    scale = self.heads[1] ** -0.25
    return feature_maps.taylor(q * scale), feature_maps.taylor(k * scale)
