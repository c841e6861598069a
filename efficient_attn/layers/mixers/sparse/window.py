"""Sliding-window softmax attention (Beltagy et al. 2020; Mistral 7B).

  o_t = sum_{s in W(t)} softmax_s(q_t . k_s / sqrt(H)) v_s

A causal window of `window` tokens is the token itself and the window - 1 before
it; a bidirectional one reaches window // 2 tokens to each side. The cache holds
the last window - 1 keys and values, whatever the length.
"""

from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class WindowRule(MaskRule):
  """The last tokens, or those around."""

  def __init__(self, *, window: Positive = 128, **told):
    super().__init__(**told)
    self.window = window
    self.remembers = window - 1

  def mask(self, count):
    """Returns the mask of `count` keys."""
    if self.heads.causal:
      return masks.Window(self.window - 1, 0)
    return masks.Window(self.window // 2, self.window // 2)
