"""LogSparse Transformer (Li et al. 1907.00235): keys at powers of two.

  o_t = sum_{|t - s| in {0, 1, 2, 4, 8, ...} or |t - s| <= local}
        softmax_s(q_t . k_s / sqrt(H)) v_s

O(T log T). The paper's convolutional queries and keys are of width 1 here, as
in its ablation.
"""

from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class LogSparse(MaskRule):
  """Powers of two, and the `local` nearest."""

  def __init__(self, *, local: Positive = 1, **told):
    super().__init__(**told)
    self.local = local

  def mask(self, count):
    """Returns the mask of `count` keys."""
    return masks.LogSparse(self.local)
