"""ReBased (Aksenov et al. 2402.10644).

  o_t = sum_s w_ts v_s / sum_s w_ts
  w_ts = (q'_t . k'_s)^2,  q' = gamma_q norm(q) + beta_q,  k' likewise

with a layer norm over the f = 16 channels (`feature_dim`) of each head: unlike
Based's, this parabola can reach zero, and where it does is learned. Its
features are the products of two channels, f (f + 1) / 2 = 136 wide.
"""

from flax import nnx

from efficient_attn.layers.mixers.linear.based import Based
from efficient_attn.layers.norm import LayerNorm
from efficient_attn.ops.recurrent import feature_maps
from efficient_attn.values import PositiveFloat


class ReBased(Based):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, *, norm_eps: PositiveFloat = 1e-5, **options):
    super().__init__(**options)
    f = self.feature_dim
    self.norms = nnx.List(LayerNorm(f, eps=norm_eps) for _ in range(2))

  def features(self, q, k, positions):
    """Returns phi(q), phi(k)."""
    # Divided by sqrt(f), a product of two vectors is at most 1 at init.
    scale = self.feature_dim**-0.5
    return tuple(
      feature_maps.quadratic(norm(x) * scale)
      for norm, x in zip(self.norms, (q, k), strict=True)
    )
