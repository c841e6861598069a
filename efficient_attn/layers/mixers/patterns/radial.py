"""Radial attention (Li et al. 2506.19852) for videos, frame after frame.

With a and b the places of t and s in their frames, and 2^e the largest power
of two that is at most the distance d of the frames (1 for d = 0),

  o_t = sum_{s: |a - b| < frame_size / 2^e or s in frame 0}
        softmax_s(q_t . k_s / sqrt(H)) v_s

Where that band is narrower than `min_width` it stays so wide, in every
(min_width 2^e / frame_size)-th frame. O(T log T) for a fixed frame_size.
"""

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.patterns.encoder import Encoder
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class Radial(Encoder):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self, *, frame_size: Positive = 256, min_width: Positive = 128, **options
  ):
    super().__init__(**options)
    self.frame_size = frame_size
    self.min_width = min_width

  def pattern(self, length: int) -> masks.Mask:
    """Bands around the diagonal of every pair of frames."""
    frames, rest = divmod(length, self.frame_size)
    if rest:
      raise ConfigError(
        f'T is {length}, which are no whole frames of frame_size='
        f'{self.frame_size}; set it to the tokens of a frame'
      )
    return masks.Radial(self.frame_size, frames, self.min_width)
