"""The linear attention of Based (Arora et al. 2402.18668).

  o_t = sum_s w_ts v_s / sum_s w_ts
  w_ts = 1 + c + c^2 / 2,  c = q_t . k_s / sqrt(f)

the Taylor expansion of exp(c), at least 1/2. Queries and keys have f = 16
channels (`feature_dim`). The features are exact and keep products of two
channels once: 1 + f + f (f + 1) / 2 = 153 wide, where the paper has 1 + f +
f^2 = 273. The paper alternates it with short sliding windows, which here is a
pattern of two mixers.
"""

from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.ops.recurrent import feature_maps
from efficient_attn.values import Positive


class Based(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, *, feature_dim: Positive = 16, **options):
    self.feature_dim = feature_dim
    super().__init__(**options)

  def key_dim(self, head_dim):
    """Returns f, whatever the width of the values."""
    return self.feature_dim

  def features(self, q, k, positions):
    """Returns phi(q), phi(k)."""
    scale = self.feature_dim**-0.25
    return feature_maps.taylor(q * scale), feature_maps.taylor(k * scale)
