"""MoBA, mixture of block attention (Lu et al. 2502.13189).

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the chosen blocks

Every query of every head chooses `top_k` blocks of `block_size` keys by the
mean of their rotated keys, its own block, seen causally, always among them.
O(T top_k block_size) and O(T^2 / block_size) for the choice. The cache holds
every past key and value, and the sum of the keys of every block. In an encoder
all blocks and all keys of the own one are open.
"""

import functools

import jax.numpy as jnp

from efficient_attn.layers.cache import extend
from efficient_attn.layers.mixer import refuse_segments
from efficient_attn.layers.mixers.routed.heads import GroupedHeads, shard
from efficient_attn.ops.routed.moba import moba_attention
from efficient_attn.values import Positive


class MoBA(GroupedHeads):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self, *, block_size: Positive = 512, top_k: Positive = 3, **options
  ):
    super().__init__(**options)
    self.block_size = block_size
    self.top_k = top_k

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    refuse_segments('moba', context)
    self.check_cacheable(cache)
    attend = functools.partial(
      moba_attention,
      block_size=self.block_size,
      top_k=self.top_k,
      causal=self.causal,
    )

    def op(query, key, value, cache):
      new = key
      key, value, cache, offset = extend(cache, key, value)
      sums = None
      if cache is not None:
        blocks = (offset + jnp.arange(new.shape[1])) // self.block_size
        sums = cache['sums'].at[:, blocks].add(new.astype(jnp.float32))
        cache['sums'] = sums
      return attend(query, key, value, offset=offset, sums=sums), cache

    op = shard(op, ('BTNH', 'BTKH', 'BTKV'))
    o, cache = op(*self.project(x, context.positions, cache), cache)
    return self.out(o), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    number = -(-max_len // self.block_size)
    sums = jnp.zeros((batch, number, *self.kv_heads))
    return super().init_cache(batch, max_len, dtype) | dict(sums=sums)
