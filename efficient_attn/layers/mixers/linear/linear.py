"""Linear attention, "Transformers are RNNs" (Katharopoulos et al. 2006.16236).

S_t = S_{t-1} + phi(k_t) v_t^T    z_t = z_{t-1} + phi(k_t)
o_t = S_t^T phi(q_t) / (z_t . phi(q_t))        phi(x) = elu(x) + 1
"""

from efficient_attn.config import choose
from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.ops.recurrent.feature_maps import FEATURE_MAPS


class LinearAttention(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, *, feature_map: str = 'elu_plus_one', **options):
    super().__init__(**options)
    self.feature_map = choose('feature_map', feature_map, FEATURE_MAPS)

  def features(self, q, k, positions):
    """Returns phi(q), phi(k)."""
    return self.feature_map(q), self.feature_map(k)
