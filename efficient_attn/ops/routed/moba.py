"""Mixture of block attention, MoBA (Lu et al. 2502.13189).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the chosen blocks
    score_ti = q_t . mean_{s in block i} k_s

Every query of every head attends to its own block, causally, and to the top_k
- 1 blocks of the highest scores among those that end before its own begins.
O(T top_k C H) time for blocks of C keys, and O(T (T / C) H) for the scores:
T / (2 top_k C^2) of that, little but quadratic. Memory O(T H), and T / C scores
for each query and head. `attention` is the reference with every block chosen.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops.pooling import block_lengths, block_sums
from efficient_attn.ops.products import product
from efficient_attn.ops.routed.selected_blocks import (
  block_attention,
  causal_bias,
  positions,
  top_blocks,
)
from efficient_attn.values import ConfigError


def moba_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  block_size: int,
  top_k: int,
  causal: bool = True,
  offset: int | Int[Array, ''] = 0,
  sums: Float[Array, 'B I K H'] | None = None,
) -> Float[Array, 'B T N V']:
  """Attention to the query's own block and the best of the others.

  Args:
    query: queries, of the tokens from `offset` on.
    key: keys; behind the last query they may be anything.
    value: values.
    block_size: keys in a block.
    top_k: blocks of a query, its own among them.
    causal: whether only earlier blocks and keys count; else all blocks do.
    offset: the index of the first query among the keys.
    sums: the sum of the keys of every block, where it is known.

  Returns:
    The output, in the query's dtype.
  """
  for name, size in (('top_k', top_k), ('block_size', block_size)):
    if size < 1:
      raise ConfigError(f'{name} is {size}; it must be at least 1.')
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  if sums is None:
    sums = block_sums(key, block_size)
  means = sums / block_lengths(S, block_size)[:, None, None]
  scores = product(
    'btkgh,bikh->btkgi',
    jax.lax.stop_gradient(query).reshape(B, T, K, N // K, H),
    jax.lax.stop_gradient(means),
  )
  own = (offset + jnp.arange(T)) // block_size
  index = jnp.arange(sums.shape[1])
  own, index = own[None, :, None, None], index[None, None, None]
  blocks = top_blocks(
    scores.reshape(B, T, N, -1),
    index < own if causal else index >= 0,
    top_k,
    forced=index == own,
  )
  marks, bias = {}, None
  if causal:
    marks = dict(query_marks=positions(T, offset), key_marks=positions(S))
    bias = causal_bias
  out, _, _ = block_attention(
    query, key, value, blocks, block_size=block_size, bias=bias, **marks
  )
  return out
