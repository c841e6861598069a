"""Pure functions on arrays of one device; see each function's docstring."""

from efficient_attn.ops import masks, scores
from efficient_attn.ops.attention import attention, explain
from efficient_attn.ops.delta_rule import delta_rule
from efficient_attn.ops.dplr import dplr
from efficient_attn.ops.forms import choose_form
from efficient_attn.ops.linear_attention import (
  affine_summary,
  linear_attention,
)
from efficient_attn.ops.positions import rotary, sincos_2d, sinusoidal
from efficient_attn.ops.short_conv import short_conv

__all__ = [
  'affine_summary',
  'attention',
  'choose_form',
  'delta_rule',
  'dplr',
  'explain',
  'linear_attention',
  'masks',
  'rotary',
  'scores',
  'short_conv',
  'sincos_2d',
  'sinusoidal',
]
