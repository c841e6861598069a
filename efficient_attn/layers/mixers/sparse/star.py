"""Star-Transformer (Guo et al. 1902.09113): a ring and a relay.

  o_t = sum_{s in {0, t-1, t, t+1}} softmax_s(q_t . k_s / sqrt(H)) v_s,   t > 0
  o_0 = sum_s softmax_s(q_0 . k_s / sqrt(H)) v_s

The relay is the first token of the sequence, as a model's class token is; the
others are satellites. One layer updates them together, where the paper updates
the relay after its satellites. O(T).
"""

from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks


class Star(MaskRule):
  """The ring and the relay."""

  def mask(self, count):
    """Returns the mask of `count` keys."""
    return masks.Window(1, 1) | masks.Global((0,))
