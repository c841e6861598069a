"""Neighborhood attention (Hassani et al. 2204.07143) in one, two or three axes.

  o_t = sum_{s in N(t)} softmax_s(q_t . k_s / sqrt(H)) v_s

N(t) holds the `window` nearest places of t along every axis of the grid, moved
inside at its borders. Tokens are its places in row-major order. O(T
window^axes).
"""

from efficient_attn.layers.mixers.sparse.grid import GridRule, per_axis
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class Neighborhood(GridRule):
  """The neighbours of every place."""

  def __init__(self, *, window: Positive | tuple[Positive, ...] = 7, **told):
    super().__init__(**told)
    self.window = window

  def check_grid(self, grid):
    """Raises where there is no grid, or one of other axes."""
    super().check_grid(grid)
    per_axis('window', self.window, grid)

  def mask(self, grid):
    """Returns the mask of the places."""
    return masks.Neighborhood(grid, per_axis('window', self.window, grid))
