"""Sliding tile attention, STA (Zhang et al. 2502.04507).

  o_t = sum_{s: tile(s) in N(tile(t))} softmax_s(q_t . k_s / sqrt(H)) v_s

Tokens are the places of the grid in row-major order, cut into tiles of `tile`
places an axis; N(i) holds the `window` tiles around i an axis, moved inside at
the borders of the grid. Tokens are put into the order of the tiles first, so
that a block of logits is either needed as a whole or not at all. O(T
window^axes tile^axes).
"""

import itertools
import math

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.sparse.grid import GridRule, per_axis
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class SlidingTile(GridRule):
  """The tiles around every tile, with the places of a tile side by side."""

  def __init__(
    self,
    *,
    tile: Positive | tuple[Positive, ...] = 8,
    window: Positive | tuple[Positive, ...] = 3,
    **told,
  ):
    super().__init__(**told)
    self.tile = tile
    self.window = window

  def check_grid(self, grid):
    """Raises where there is no grid, or one that tiles do not divide."""
    super().check_grid(grid)
    per_axis('window', self.window, grid)
    self.tiles(grid)

  def tiles(self, grid):
    """The size of a tile, and how many tiles each axis has."""
    tile = per_axis('tile', self.tile, grid)
    if any(g % t for g, t in zip(grid, tile, strict=True)):
      raise ConfigError(
        f'tile={tile} does not divide the grid {grid}; pad the grid, or choose'
        ' tiles that do.'
      )
    return tile, tuple(g // t for g, t in zip(grid, tile, strict=True))

  def arrange(self, heads, grid, back=False):
    """From row-major order of the places to that of the tiles, or back."""
    (tile, cells), axes = self.tiles(grid), len(grid)
    # [cells, places] of every axis, then all cells and all places.
    split = [*itertools.chain(*zip(cells, tile, strict=True))]
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
    if back:
      split = [split[i] for i in order]
      order = sorted(range(2 * axes), key=order.__getitem__)
    rest = [2 * axes + 1 + i for i in range(heads.ndim - 2)]
    y = heads.reshape(heads.shape[0], *split, *heads.shape[2:])
    y = y.transpose(0, *(1 + i for i in order), *rest)
    return y.reshape(heads.shape)

  def mask(self, grid):
    """Returns the mask of the places in the order of the tiles."""
    tile, cells = self.tiles(grid)
    window = per_axis('window', self.window, grid)
    return masks.Neighborhood(cells, window, math.prod(tile))
