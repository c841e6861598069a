"""SeerAttention (Gao et al. 2410.13276): blocks chosen by a learned gate.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the top_k blocks of t
    score_ti = rope(W_q q_t) . rope(W_k [max; min; mean]_{s in i} k_s) / sqrt(E)

with queries and keys before their rotation. An encoder chooses for blocks of
queries, by the mean of q over the block. A decoder may not average what is to
come: it chooses for single queries, takes the own block always, and the others
among those that are complete, as SeerAttention-R does (2506.08889). O(T top_k C
H) for blocks of C keys, and O(T (T / C) E) for the scores.

The gate learns from the divergence of its softmax over the chosen blocks from
the weight that the attention gives to them. (The paper fits it to a frozen
model, to the largest weight in every block.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops.pooling import block_means
from efficient_attn.ops.products import product
from efficient_attn.ops.routed.selected_blocks import (
  block_attention,
  causal_bias,
  positions,
  top_blocks,
)
from efficient_attn.ops.routed.selected_tokens import divergence
from efficient_attn.ops.softmax.stats import exp_below


def seer_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  gate_query: Float[Array, 'B T K E'],
  gate_key: Float[Array, 'B I K E'],
  *,
  block_size: int,
  top_k: int,
  causal: bool = True,
  offset: int | Int[Array, ''] = 0,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T K']]:
  """Attention to the blocks of the highest gates.

  Args:
    query: queries, of the tokens from `offset` on.
    key: keys.
    value: values.
    gate_query: the gate's queries.
    gate_key: the gate's keys, one for each block.
    block_size: keys in a block.
    top_k: blocks of a query and group of heads.
    causal: whether later tokens are hidden and the own block is given.
    offset: the index of the first query among the keys.

  Returns:
    The output, in the query's dtype, and the loss of the gate.
  """
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  stats = jnp.promote_types(query.dtype, jnp.float32)
  scores = gate_query.shape[-1] ** -0.5 * product(
    'btke,bike->btki', gate_query, gate_key, dtype=stats
  )
  own = ((offset + jnp.arange(T)) // block_size)[:, None, None]
  index = jnp.arange(gate_key.shape[1])
  marks, bias, forced = {}, None, False
  if causal:
    marks = dict(query_marks=positions(T, offset), key_marks=positions(S))
    bias, forced = causal_bias, index == own
  allowed = index < own if causal else index >= 0
  blocks = top_blocks(scores, allowed, top_k, forced=forced)
  out, stats, parts = block_attention(
    query, key, value, blocks, block_size=block_size, bias=bias, **marks
  )
  # The gate of the own block sees what is to come, and chooses nothing.
  there = (blocks >= 0) & (blocks != own) if causal else blocks >= 0
  weights = parts.total * exp_below(parts.top, stats.top[..., None])
  weights = jax.lax.stop_gradient(stats.divide(weights))
  weights = jnp.mean(weights.reshape(B, T, K, N // K, -1), 3)
  weights = jnp.where(there, weights, 0)
  total = jnp.sum(weights, -1, keepdims=True)
  weights = weights / jnp.where(total == 0, 1, total)
  found = jnp.take_along_axis(scores, jnp.maximum(blocks, 0), -1)
  return out, divergence(weights, found, there)


def pools(
  key: Float[Array, 'B S K H'], block_size: int
) -> Float[Array, 'B I K P']:
  """The largest, the smallest and the mean key of every block, 3 H wide."""
  number = -(-key.shape[1] // block_size)
  rest = number * block_size - key.shape[1]

  def blocks(fill):
    x = jnp.pad(key, ((0, 0), (0, rest), (0, 0), (0, 0)), constant_values=fill)
    return x.reshape(x.shape[0], number, block_size, *x.shape[2:])

  mean = block_means(key, block_size).astype(key.dtype)
  return jnp.concatenate(
    [blocks(-jnp.inf).max(2), blocks(jnp.inf).min(2), mean], -1
  )
