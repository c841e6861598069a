"""What attention over a fixed grid of tokens shares: whole sequences only."""

from efficient_attn.layers.mixer import refuse_cache, refuse_segments
from efficient_attn.layers.mixers.softmax.attention import Attention


class Encoder(Attention):
  """Attention with a pattern that depends on where the whole sequence ends.

  Positions are the model's to add, as a number along the sequence says little
  about a place in a grid.
  """

  def __init__(self, *, position: str = 'none', **options):
    super().__init__(position=position, **options)

  mix_sharing = None  # its keys and values are not those of attention

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    name = type(self).__name__
    if cache is not None:
      refuse_cache(name)
    refuse_segments(name, context)
    heads = self.project(x, context.positions, None)
    return self.attend(*heads, self.pattern(x.shape[1]), 0, x), None

  def init_cache(self, batch: int, max_len: int, dtype):
    """Refuses: there is no next token."""
    refuse_cache(type(self).__name__)


def per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
  """One number for every axis of a grid."""
  return (value,) * axes if isinstance(value, int) else tuple(value)
