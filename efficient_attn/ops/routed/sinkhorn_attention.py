"""Sparse Sinkhorn attention (Tay et al. 2002.11296): blocks put in order.

    o_t = softmax([q_t K_i^T, q_t K'_i^T] / sqrt(H)) [V_i; V'_i]
    K'_i = sum_j P_ij K_j,   V'_i = sum_j P_ij V_j

with i the block of t. P is a relaxed permutation of the blocks: exp(R /
temperature), its rows and columns divided by their sums in turns, `sinkhorn`.
A decoder knows no sum over later rows: there P is the softmax of every row over
the blocks before it, and K_i is seen causally. (In print the paper adds the two
logits and weighs V'_i alone; its decoder divides by sums over later rows.)

O(T C H) time for blocks of C tokens, and O(T (T / C) H) for the mixtures.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops.routed.selected_blocks import (
  block_attention,
  causal_bias,
  positions,
)
from efficient_attn.ops.softmax.normalizers import softmax
from efficient_attn.values import ConfigError


def sinkhorn(
  logits: Float[Array, '*rows I J'], iterations: int
) -> Float[Array, '*rows I J']:
  """exp(logits) after `iterations` of dividing rows, then columns, by sums."""

  def step(p, _):
    p = p / jnp.sum(p, -1, keepdims=True)
    return p / jnp.sum(p, -2, keepdims=True), None

  top = jax.lax.stop_gradient(jnp.max(logits, (-2, -1), keepdims=True))
  return jax.lax.scan(step, jnp.exp(logits - top), length=iterations)[0]


def earlier(
  logits: Float[Array, '*rows I J'], first: int | Int[Array, '']
) -> Float[Array, '*rows I J']:
  """The softmax of every row first + i over the columns before it."""
  rows = first + jnp.arange(logits.shape[-2])
  return softmax(logits, jnp.arange(logits.shape[-1]) < rows[:, None])


def sinkhorn_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  order: Float[Array, 'B K I J'],
  *,
  block_size: int,
  causal: bool = True,
  offset: int | Int[Array, ''] = 0,
) -> Float[Array, 'B T N V']:
  """Attention to the own block and a mixture of blocks.

  Args:
    query: queries, of the tokens from `offset` on.
    key: keys, in J blocks.
    value: values.
    order: P, its rows from the block of the first query on.
    block_size: tokens in a block.
    causal: whether later tokens of the own block are hidden.
    offset: the index of the first query among the keys.

  Returns:
    The output, in the query's dtype.
  """
  B, T = query.shape[:2]
  S, number, rows = key.shape[1], order.shape[3], order.shape[2]
  if number != -(-S // block_size):
    raise ValueError(
      f'order has {number} columns but S = {S} keys are {-(-S // block_size)}'
      f' blocks of {block_size}.'
    )
  if not causal and S % block_size:
    raise ConfigError(
      f'block_size = {block_size} does not divide S = {S}, so blocks cannot'
      ' change places; pad the sequence or choose a divisor.'
    )

  def with_mixtures(x):  # [B, S, K, *] to [B, (J + I) C, K, *]
    x = jnp.pad(x, ((0, 0), (0, number * block_size - S), (0, 0), (0, 0)))
    blocks = x.reshape(B, number, block_size, *x.shape[2:])
    mixed = jnp.einsum('bkij,bjckh->bickh', order.astype(x.dtype), blocks)
    return jnp.concatenate([x, mixed.reshape(B, -1, *x.shape[2:])], 1)

  own = (offset + jnp.arange(T)) // block_size
  other = number + own - own[0]
  marks, bias = {}, None
  if causal:
    other = jnp.where(own > 0, other, -1)
    before = jnp.full((1, rows * block_size, 1), -1, jnp.int32)
    places = jnp.concatenate([positions(number * block_size), before], 1)
    marks = dict(query_marks=positions(T, offset), key_marks=places)
    bias = causal_bias
  blocks = jnp.stack([own, other], -1)[None, :, None]
  out, _, _ = block_attention(
    query,
    with_mixtures(key),
    with_mixtures(value),
    jnp.broadcast_to(blocks, (B, T, key.shape[2], 2)),
    block_size=block_size,
    bias=bias,
    **marks,
  )
  return out
