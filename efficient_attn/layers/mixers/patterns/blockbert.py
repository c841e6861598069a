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
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.mixers.patterns.encoder import Encoder
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import Positive


class BlockBERT(Encoder):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    num_blocks: Positive = 2,
    shifts: tuple[int, ...] = (),
    position: str = 'none',
    sinks: bool = False,
    **options,
  ):
    # Scores of other blocks are never placed in the whole sequence.
    choose('position', position, {'none': 0, 'rotary': 1})
    if sinks:
      raise ConfigError('sinks=True is not an option of blockbert')
    super().__init__(position=position, **options)
    if shifts and len(shifts) != self.num_heads:
      raise ConfigError(
        f'shifts={shifts} must be one for each of num_heads={self.num_heads}'
      )
    self.num_blocks = num_blocks
    self.shifts = tuple(shifts) or tuple(
      n % num_blocks for n in range(self.num_heads)
    )

  def pattern(self, length: int) -> masks.Mask:
    """Which blocks each head sees: the rule that `read` follows."""
    if length % self.num_blocks:
      raise ConfigError(
        f'T is {length}, no multiple of num_blocks={self.num_blocks}; pad the'
        ' sequences.'
      )
    size = length // self.num_blocks
    layout = masks.shifted_blocks(self.num_blocks, self.shifts)
    return masks.Blocks(layout, size, size)

  def read(self, query, key, value, mask, offset):
    """Reads block by block, without the logits of other blocks."""
    del mask, offset

    def op(query, key, value, shifts):
      blocks = np.arange(self.num_blocks)[:, None]
      others = (blocks + shifts) % self.num_blocks  # [blocks, N]

      def cut(x):
        x = jnp.repeat(x, query.shape[2] // x.shape[2], axis=2)
        return x.reshape(x.shape[0], self.num_blocks, -1, *x.shape[2:])

      def permuted(x):
        index = others[None, :, None, :, None]
        return jnp.take_along_axis(cut(x), index, axis=1)

      parts = cut(query), permuted(key), permuted(value)
      parts = (x.reshape(-1, *x.shape[2:]) for x in parts)
      return attention(*parts, **self.options).reshape(query.shape)

    shifts = jnp.asarray(self.shifts)
    op = sharding.local_op(op, ('BTNH', 'BTKH', 'BTKV', 'N'), 'BTNV')
    return op(query, key, value, shifts)
