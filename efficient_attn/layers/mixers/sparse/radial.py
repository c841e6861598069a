"""Radial attention (Li et al. 2506.19852) for videos, frame after frame.

With a and b the places of t and s in their frames, and 2^e the largest power
of two that is at most the distance d of the frames (1 for d = 0),

  o_t = sum_{s: |a - b| < frame_size / 2^e or s in frame 0}
        softmax_s(q_t . k_s / sqrt(H)) v_s

Where that band is narrower than `min_width` it stays so wide, in every
(min_width 2^e / frame_size)-th frame. O(T log T) for a fixed frame_size. The
first axis of the grid counts the frames; those of an image are its rows.
"""

import math

from efficient_attn.layers.mixers.sparse.grid import GridRule
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class Radial(GridRule):
  """Bands around the diagonal of every pair of frames."""

  def __init__(self, *, min_width: Positive = 128, **told):
    super().__init__(**told)
    self.min_width = min_width

  def mask(self, grid):
    """Returns the mask of the places."""
    return masks.Radial(math.prod(grid[1:]), grid[0], self.min_width)
