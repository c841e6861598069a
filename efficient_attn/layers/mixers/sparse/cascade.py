"""Cascade Transformer (Wang et al. 2002.06170): windows that grow with depth.

  o_t = sum_{|t - s| < base factor^level} softmax_s(q_t . k_s / sqrt(H)) v_s

The pattern of a model gives each layer its `level`: ('cascade:0', 'cascade:1',
...) with options {'cascade:1': {'level': 1}}. O(T base factor^level).
"""

from typing import Annotated

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks
from efficient_attn.values import LARGEST, Positive, Range


class Cascade(MaskRule):
  """The window of a level."""

  def __init__(
    self,
    *,
    base: Positive = 16,
    factor: Positive = 2,
    level: Annotated[int, Range(0, 30)] = 0,
    **told,
  ):
    super().__init__(**told)
    if base * factor**level > LARGEST:
      raise ConfigError(
        f'base={base} factor={factor} level={level}: the window is too large'
      )
    self.sizes = base, factor, level

  def mask(self, count):
    """Returns the mask of `count` keys."""
    return masks.cascade(*self.sizes)
