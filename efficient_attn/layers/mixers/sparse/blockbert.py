"""BlockBERT (Qiu et al. 1911.02972): each head pairs blocks by a permutation.

  o_t = sum_{s: block(s) = block(t) + shift_n mod num_blocks}
        softmax_s(q_t . k_s / sqrt(H)) v_s

for head n, in `num_blocks` equal blocks of the sequence. shift_n is n mod
num_blocks unless `shifts` says it; the paper's BERT-base has 10 or 8 heads of
12 stay in their block. O(T^2 / num_blocks).
"""

import jax.numpy as jnp
import numpy as np

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.mixer import WholeMixer
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import Positive


class ShiftedBlocks(MaskRule):
  """Each head sees the blocks that its shift leads to."""

  takes_bias = False  # scores of other blocks are not placed in the sequence

  def __init__(
    self, *, num_blocks: Positive = 2, shifts: tuple[int, ...] = (), **told
  ):
    super().__init__(**told)
    heads = self.heads.query
    if shifts and len(shifts) != heads:
      raise ConfigError(
        f'shifts={shifts} must be one for each of num_heads={heads}'
      )
    self.num_blocks = num_blocks
    self.shifts = tuple(shifts) or tuple(n % num_blocks for n in range(heads))

  def mask(self, count):
    """Returns the mask of `count` keys, as `BlockBERT` computes it."""
    if count % self.num_blocks:
      raise ConfigError(
        f'T is {count}, no multiple of num_blocks={self.num_blocks}; pad the'
        ' sequences.'
      )
    size = count // self.num_blocks
    layout = masks.shifted_blocks(self.num_blocks, self.shifts)
    return masks.Blocks(layout, size, size)


class BlockBERT(WholeMixer, Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def mix_whole(self, x, context):
    """Mixes block by block, without the logits of other blocks."""
    self.mask_rule.mask(x.shape[1])  # which checks the length
    number = self.mask_rule.num_blocks

    def op(query, key, value, shifts):
      blocks = np.arange(number)[:, None]
      others = (blocks + shifts) % number  # [blocks, N]

      def cut(x):
        x = jnp.repeat(x, query.shape[2] // x.shape[2], axis=2)
        return x.reshape(x.shape[0], number, -1, *x.shape[2:])

      def permuted(x):
        index = others[None, :, None, :, None]
        return jnp.take_along_axis(cut(x), index, axis=1)

      parts = cut(query), permuted(key), permuted(value)
      parts = (x.reshape(-1, *x.shape[2:]) for x in parts)
      o = attention(*parts, scale=self.scale, **self.weights.options)
      return o.reshape(query.shape)

    op = sharding.local_op(op, ('BTNH', 'BTKH', 'BTKV', 'N'), 'BTNV')
    heads = self.project(x, context, None)
    return self.output(op(*heads, jnp.asarray(self.mask_rule.shifts)), x)
