"""Attention from one sequence to another (Vaswani et al. 1706.03762).

  y_t = W_o sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,  q = W_q x,  k, v = W c

The keys and values of the memory c are computed once for any number of calls:
they are the whole cache of a decoder's cross-attention.
"""

import jax
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import Projection
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention


class CrossAttention(Mixer):
  """Maps x [B, T, D] to the same shape by what it reads in a memory."""

  def __init__(
    self,
    d_model: int,
    num_heads: int,
    *,
    rngs: nnx.Rngs,
    implementation: str | None = None,
  ):
    embed = {'embed': d_model}
    heads = {'heads': num_heads, 'head_dim': d_model // num_heads}
    self.query = Projection(embed, heads, rngs=rngs)
    self.key = Projection(embed, heads, rngs=rngs)
    self.value = Projection(embed, heads, rngs=rngs)
    self.out = Projection(heads, embed, rngs=rngs)
    self.implementation = implementation

  def keys_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values [B, S, N, H] of a memory [B, S, D]: a cache."""
    return self.key(memory), self.value(memory)

  def mix_tokens(self, x, context, cache):
    """Reads the memory of the context, or what `keys_values` made of it."""
    heads = self.keys_values(context.memory) if cache is None else cache
    mask = None
    if context.memory_mask is not None:
      mask = masks.Dense(context.memory_mask[:, None, None])

    def op(query, key, value, mask):
      return attention(
        query, key, value, mask=mask, implementation=self.implementation
      )

    layouts = ('BTNH', 'BSNH', 'BSNV', masks.letters(mask))
    op = sharding.local_op(op, layouts, 'BTNV')
    return self.out(op(self.query(x), *heads, mask)), cache
