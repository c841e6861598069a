"""Attention over a fixed grid of tokens: whole sequences only."""

import math

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixer import WholeMixer, check_has_grid
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks


class GridRule(MaskRule):
  """A rule for places of a grid, which the model hands down."""

  def check_grid(self, grid: tuple[int, ...]) -> None:
    """Raises where there is no grid, or one that the rule cannot use."""
    check_has_grid(type(self).__name__, grid)

  def mask(self, grid: tuple[int, ...]) -> masks.Mask:
    """Returns the mask of the places."""
    raise NotImplementedError

  def arrange(self, heads, grid, back=False):
    """Puts heads [B, T, N, H] into the order of the mask, or back."""
    return heads


class GridAttention(WholeMixer, Attention):
  """Attention with a `GridRule`.

  Positions are the model's to add, as a number along the sequence says little
  about a place in a grid.
  """

  def check_grid(self, grid: tuple[int, ...]) -> None:
    """Raises where there is no grid, or one that the rule cannot use."""
    self.mask_rule.check_grid(grid)

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""
    grid, length = context.grid, x.shape[1]
    self.check_grid(grid)
    if math.prod(grid) != length:
      raise ConfigError(
        f'T is {length} but grid={grid} has {math.prod(grid)} places; they must'
        ' be as many'
      )
    heads = self.project(x, context, None)
    query, key, value = (self.mask_rule.arrange(h, grid) for h in heads)
    bias = self.bias(0)
    mask = self.mask_rule.mask(grid)
    o = self.weights(query, key, value, mask, bias, self.scale)
    return self.output(self.mask_rule.arrange(o, grid, back=True), x)


def per_axis(
  name: str, value: int | tuple[int, ...], grid: tuple[int, ...]
) -> tuple[int, ...]:
  """One number for every axis of a grid."""
  value = (value,) * len(grid) if isinstance(value, int) else tuple(value)
  if len(value) != len(grid):
    raise ConfigError(
      f'{name}={value} must be one number for all axes of grid={grid}, or one '
      'for each'
    )
  return value
