"""Who sees whom in an attention layer, beside causality."""

from flax import nnx

from efficient_attn.layers.mixers.softmax.heads import Heads
from efficient_attn.ops import masks, scores


class MaskRule(nnx.Module):
  """A part of `Attention`; this one lets everyone see everyone.

  Attributes:
    takes_bias: whether position rules may add to the logits.
    packs: whether it holds in every segment of a packed row.
    remembers: how many past tokens a query may see; None for all of them.
  """

  takes_bias = True
  packs = True
  remembers: int | None = None

  def __init__(self, *, heads: Heads, rngs: nnx.Rngs):
    self.heads = heads

  def mask(self, count: int) -> masks.Mask | None:
    """Returns the mask of `count` keys by their places; None for all."""
    return None

  def bias(self, offset) -> scores.Score | None:
    """What joins the logits of queries whose first has place `offset`."""
    return None
