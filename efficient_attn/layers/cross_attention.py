"""Attention from one sequence to another (Vaswani et al. 1706.03762).

  y_t = W_o sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,  q = W_q x,  k, v = W c

The keys and values of the memory c are computed once for any number of calls:
they are the whole cache of a decoder's cross-attention.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import Projection
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention


@chex.dataclass(frozen=True)
class Memory:
  """A memory as cross-attention reads it.

  Attributes:
    key: [B, S, N, H].
    value: [B, S, N, H].
    segment_ids: [B, S] int32, see `Context.memory_ids`; None: one segment.
  """

  key: jax.Array
  value: jax.Array
  segment_ids: jax.Array | None = None


@chex.dataclass(frozen=True)
class CrossCache:
  """The cache of a block with cross-attention.

  Attributes:
    mixer: the cache of its mixer.
    memory: does not change.
  """

  mixer: Any
  memory: Memory


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

  def remember(self, context: Context) -> Memory:
    """Returns the memory of the context, whose padding may hold anything."""
    memory, ids = context.memory, context.memory_ids
    if ids is not None:
      memory = jnp.where((ids == 0)[..., None], 0, memory)
      ids = jnp.copy(ids)  # a buffer for each layer, so that it can be donated
    return Memory(
      key=self.key(memory), value=self.value(memory), segment_ids=ids
    )

  def mix_tokens(self, x, context, cache):
    """Reads the memory of the context, or what `remember` made of it."""
    memory = self.remember(context) if cache is None else cache
    mask = _same_segment(x, context.segment_ids, memory.segment_ids)

    def op(query, key, value, mask):
      return attention(
        query, key, value, mask=mask, implementation=self.implementation
      )

    layouts = ('BTNH', 'BSNH', 'BSNV', masks.letters(mask))
    op = sharding.local_op(op, layouts, 'BTNV')
    y = op(self.query(x), memory.key, memory.value, mask)
    return self.out(y), cache


def _same_segment(x, ids, memory_ids):
  """Returns which tokens of a memory each of x [B, T, D] reads."""
  if memory_ids is None:
    return None
  if ids is None:
    memory_ids = (memory_ids != 0).astype(jnp.int32)
    ids = jnp.ones_like(x[..., 0], jnp.int32)
  return masks.Segments(ids, memory_ids)
