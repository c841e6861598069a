"""The norm of queries and keys (Henry et al. 2010.04245), before rotation."""

import dataclasses

from flax import nnx

from efficient_attn.layers.head_norm import JointRMSNorm
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.values import NonNegativeFloat


@dataclasses.dataclass(frozen=True)
class QKNorm:
  """An RMS norm of each head, or of all channels together if `joint`.

  All heads share one scale (H) in the first, as in Qwen3; each has its own in
  the second, as in OLMo2. With `zero_centered` the parameter is scale - 1.
  """

  joint: bool = False
  eps: NonNegativeFloat = 1e-6
  zero_centered: bool = False

  def build(self, num_heads: int, head_dim: int) -> nnx.Module:
    """Returns the norm of heads [B, T, N, H]."""
    if self.joint:
      return JointRMSNorm(num_heads, head_dim, eps=self.eps)
    return RMSNorm(head_dim, eps=self.eps, zero_centered=self.zero_centered)
