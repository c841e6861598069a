"""BigBird (Zaheer et al. 2007.14062): window, global and random blocks.

  o_t = sum_{s: block(s) near, global or random for block(t), or t global}
        softmax_s(q_t . k_s / sqrt(H)) v_s

in blocks of `block_size` tokens: the query's and those beside it, `num_random`
of the others, and the global ones, which see all. In BigBird-ITC (num_global is
0) the first block and, in an encoder, the last are global; in BigBird-ETC the
first `num_global` tokens of the sequence are, which the model puts there. All
heads share the random blocks, drawn once from `seed`. O(T block_size).
"""

from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks
from efficient_attn.values import NonNegative, Positive, Seed


class BigBird(MaskRule):
  """Window, random and global blocks."""

  def __init__(
    self,
    *,
    block_size: Positive = 64,
    num_random: NonNegative = 3,
    num_global: NonNegative = 0,
    seed: Seed = 0,
    **told,
  ):
    super().__init__(**told)
    # Else the last block and the draw belong to the whole row.
    self.packs = self.heads.causal
    self.block_size = block_size
    self.num_random = num_random
    self.num_global = num_global
    self.seed = seed

  def mask(self, count):
    """Returns the mask of `count` keys."""
    size, causal = self.block_size, self.heads.causal
    first = self.num_global or size
    mask = (
      masks.BlockWindow(size, 1, 1)
      | masks.RandomBlocks(count, size, self.num_random, self.seed, causal)
      | masks.Prefix(first)
      | masks.Leading(first)
    )
    if self.num_global or causal:
      return mask
    others = (count - 1) // size * size
    return mask | ~masks.Prefix(others) | ~masks.Leading(others)
