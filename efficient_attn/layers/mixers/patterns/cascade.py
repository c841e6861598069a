"""Cascade Transformer (Wang et al. 2002.06170): windows that grow with depth.

  o_t = sum_{|t - s| < base factor^level} softmax_s(q_t . k_s / sqrt(H)) v_s

The pattern of a model gives each layer its `level`: ('cascade:0', 'cascade:1',
...) with options {'cascade:1': {'level': 1}}. O(T base factor^level).
"""

from typing import Annotated

from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.ops import masks
from efficient_attn.values import LARGEST, ConfigError, Positive, Range


class Cascade(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    base: Positive = 16,
    factor: Positive = 2,
    level: Annotated[int, Range(0, 30)] = 0,
    **options,
  ):
    super().__init__(**options)
    if base * factor**level > LARGEST:
      raise ConfigError(
        f'base={base} factor={factor} level={level}: the window is too large'
      )
    self.base = base
    self.factor = factor
    self.level = level

  def pattern(self, length: int) -> masks.Mask:
    """The window of the level."""
    return masks.cascade(self.base, self.factor, self.level)
