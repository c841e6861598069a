# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Patterns with a name of their own, and layouts of blocks."""

import functools

import numpy as np
from jaxtyping import Bool

from efficient_attn.ops.masks.algebra import Mask
from efficient_attn.ops.masks.arrays import Blocks
from efficient_attn.ops.masks.distance import Window
from efficient_attn.ops.masks.expression import expression
from efficient_attn.ops.masks.rules import Prefix


def streaming(num_sinks: int, window: int) -> Mask:
  """The first `num_sinks` keys and the last `window`, the query's included.

  StreamingLLM, Xiao et al. (2023), https://arxiv.org/abs/2309.17453. To be
  joined with `Causal`.
  """
  return Window(window - 1, 0) | Prefix(num_sinks)


def cascade(base: int, factor: int, level: int) -> Window:
  """A window of 2 base factor^level - 1 keys, the query in the middle.

  Cascade Transformer, Wang et al. (2020), https://arxiv.org/abs/2002.06170.
  """
  side = base * factor**level - 1
  return Window(side, side)


@expression
class RandomBlocks(Mask):
  """Admits the blocks of `random_blocks` of `length` tokens.

  What `Blocks` does with their layout, but without an array: the block map
  also knows them where arrays are traced, as in a shard.
  """

  length: int
  block_size: int
  count: int
  seed: int
  causal: bool

  def _blocks(self, T, S):
    size, longest = self.block_size, max(T, S)
    if longest > self.length:
      raise ValueError(
        f'masks.RandomBlocks of length {self.length} has no blocks for T = {T}'
        f' and S = {S}; draw them for {longest} tokens.'
      )
    layout = random_blocks(
      -(-self.length // size), self.count, seed=self.seed, causal=self.causal
    )
    return Blocks(layout[: -(-T // size), : -(-S // size)], size, size)

  def pairs(self, query, key):
    return self._blocks(self.length, self.length).pairs(query, key)

  def elementwise(self, T, S):
    return self._blocks(T, S).elementwise(T, S)

  def dense(self, T, S):
    return self._blocks(T, S).dense(T, S)

  def block_map(self, T, S, block_q, block_k):
    return self._blocks(T, S).block_map(T, S, block_q, block_k)


@functools.lru_cache(maxsize=64)
def random_blocks(
  num_blocks: int, count: int, *, seed: int, causal: bool
) -> Bool[np.ndarray, 'I I']:
  """`count` random blocks of keys for every block of queries.

  BigBird, Zaheer et al. (2020), https://arxiv.org/abs/2007.14062. Not among
  them are those which a query of BigBird sees anyway: its own block, the ones
  beside it, and the first and the last. A row depends on `seed` and its index,
  where `causal` on these alone; its blocks then come before it.
  """
  layout = np.zeros((num_blocks, num_blocks), bool)
  for i in range(num_blocks):
    others = np.arange(1, i - 1 if causal else num_blocks - 1)
    others = others[abs(others - i) > 1]
    rng = np.random.default_rng((seed, i))
    chosen = rng.choice(others.size, min(count, others.size), replace=False)
    layout[i, others[chosen]] = True
  layout.flags.writeable = False  # shared by all who ask again
  return layout


def shifted_blocks(
  num_blocks: int, shifts: tuple[int, ...]
) -> Bool[np.ndarray, 'N I I']:
  """For head n, the block shifts[n] blocks after the query's, cyclic.

  BlockBERT, Qiu et al. (2020), https://arxiv.org/abs/1911.02972.
  """
  eye = np.eye(num_blocks, dtype=bool)
  return np.stack([np.roll(eye, shift, axis=1) for shift in shifts])
