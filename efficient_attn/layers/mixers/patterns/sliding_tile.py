"""Sliding tile attention, STA (Zhang et al. 2502.04507).

  o_t = sum_{s: tile(s) in N(tile(t))} softmax_s(q_t . k_s / sqrt(H)) v_s

Tokens are the places of `grid` in row-major order, cut into tiles of `tile`
places an axis; N(i) holds the `window` tiles around i an axis, moved inside at
the borders of the grid. Tokens are put into the order of the tiles first, so
that a block of logits is either needed as a whole or not at all. grid = () is
one axis of all tokens. O(T window^axes tile^axes).
"""

import itertools
import math

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.patterns.encoder import Encoder, per_axis
from efficient_attn.layers.mixers.patterns.neighborhood import check_grid
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class SlidingTile(Encoder):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    grid: tuple[Positive, ...] = (),
    tile: Positive | tuple[Positive, ...] = 8,
    window: Positive | tuple[Positive, ...] = 3,
    **options,
  ):
    super().__init__(**options)
    axes = max(len(grid), 1)
    self.grid = tuple(grid)
    self.tile = per_axis(tile, axes)
    self.window = per_axis(window, axes)
    if not axes == len(self.tile) == len(self.window):
      raise ConfigError(
        f'tile={tile} and window={window} must say one number for all axes of'
        f' grid={grid}, or one for each'
      )

  def read(self, query, key, value, mask, offset):
    """Reads in the order of the tiles."""
    length = query.shape[1]
    heads = [self.sort(x, length) for x in (query, key, value)]
    o = super().read(*heads, mask, offset)
    return self.sort(o, length, back=True)

  def cells(self, length):
    """How many tiles each axis has."""
    grid = self.grid or (length,)
    check_grid(grid, length)
    if any(g % t for g, t in zip(grid, self.tile, strict=True)):
      raise ConfigError(
        f'tile={self.tile} does not divide the grid {grid}; pad the grid, or'
        ' choose tiles that do.'
      )
    return tuple(g // t for g, t in zip(grid, self.tile, strict=True))

  def sort(self, x, length, back=False):
    """From row-major order of the places to that of the tiles, or back."""
    cells, axes = self.cells(length), len(self.tile)
    # [cells, places] of every axis, then all cells and all places.
    split = [*itertools.chain(*zip(cells, self.tile, strict=True))]
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
    if back:
      split = [split[i] for i in order]
      order = sorted(range(2 * axes), key=order.__getitem__)
    rest = [2 * axes + 1 + i for i in range(x.ndim - 2)]
    y = x.reshape(x.shape[0], *split, *x.shape[2:])
    y = y.transpose(0, *(1 + i for i in order), *rest)
    return y.reshape(x.shape)

  def pattern(self, length: int) -> masks.Mask:
    """The tiles around every tile."""
    cells, size = self.cells(length), math.prod(self.tile)
    return masks.Neighborhood(cells, self.window, size)
