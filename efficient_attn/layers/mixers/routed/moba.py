"""MoBA, mixture of block attention (Lu et al. 2502.13189).

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the chosen blocks

Every query of every head chooses `top_k` blocks of `block_size` keys by the
mean of their rotated keys, its own block, seen causally, always among them.
O(T top_k block_size) and O(T^2 / block_size) for the choice. The cache holds
every past key and value, and the sum of the keys of every block. In an encoder
all blocks and all keys of the own one are open.
"""

import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.layers.cache import recall
from efficient_attn.layers.mixers.routed.heads import GroupedHeads
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
    query, new, value = self.project(x, context, cache)
    (key, value), after, offset = recall(context, cache, key=new, value=value)

    def op(query, key, value, new, sums, *, offset):
      if sums is not None:
        blocks = (offset + jnp.arange(new.shape[1])) // self.block_size
        sums = sums.at[:, blocks].add(new.astype(jnp.float32))
      out = moba_attention(
        *(query, key, value),
        block_size=self.block_size,
        top_k=self.top_k,
        causal=self.causal,
        offset=offset,
        sums=sums,
      )
      return out, sums

    layouts = ('BTNH', 'BSKH', 'BSKV', 'BTKH', 'BIKH')
    op = sharding.local_op(op, layouts, ('BTNV', 'BIKH'), offset='')
    sums = cache and cache.state
    o, sums = op(query, key, value, new, sums, offset=offset)
    return self.out(o), after and after.replace(state=sums)

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    number = -(-max_len // self.block_size)
    sums = jnp.zeros((batch, number, *self.kv_heads))
    return super().init_cache(batch, max_len, dtype, state=sums)
