"""Neighborhood attention (Hassani et al. 2204.07143) in one, two or three axes.

  o_t = sum_{s in N(t)} softmax_s(q_t . k_s / sqrt(H)) v_s

N(t) holds the `window` nearest places of t along every axis of `grid`, moved
inside at its borders. Tokens are the places of the grid in row-major order;
grid = () is one axis of all tokens. O(T window^axes).
"""

import math

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.patterns.encoder import Encoder, per_axis
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class Neighborhood(Encoder):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    grid: tuple[Positive, ...] = (),
    window: Positive | tuple[Positive, ...] = 7,
    **options,
  ):
    super().__init__(**options)
    self.grid = tuple(grid)
    self.window = per_axis(window, max(len(grid), 1))
    if len(self.window) != max(len(grid), 1) or min(self.window) < 1:
      raise ConfigError(
        f'window={window} must be at least 1 for each axis of grid={grid}'
      )

  def pattern(self, length: int) -> masks.Mask:
    """The neighbours of every place of the grid."""
    grid = self.grid or (length,)
    check_grid(grid, length)
    return masks.Neighborhood(grid, self.window)


def check_grid(grid: tuple[int, ...], length: int) -> None:
  """Raises where a grid is not one of `length` tokens."""
  if math.prod(grid) != length:
    raise ConfigError(
      f'T is {length} but grid={grid} has {math.prod(grid)} places; they must'
      " be as many (a class token has none: set model.pooling='mean')."
    )
