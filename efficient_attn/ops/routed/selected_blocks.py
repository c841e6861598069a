"""Attention of every query to blocks of keys of its own choice.

    o_t = sum_s softmax_s(scale q_t . k_s + bias_ts) v_s,   s in blocks(t)

which mixture of block attention, NSA's selected branch, LSH and routing
attention, SeerAttention, Sinkhorn attention and VSA share. The pairs (query,
block) are sorted by block and cut into tiles of R pairs of one block, as tokens
are dealt to experts, so a tile is one product [R, H] x [H, C] and a block is
read once for R queries. P = T top_k pairs over I blocks make at most (P + I (R
- 1)) / R tiles.

O(T top_k C H) time and O(T H) memory, forward and backward; see
`selected_tiles`. Where a query stands in its tile depends only on the queries
before it, so what follows a query changes no bit of its output. First-order
reverse mode only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from efficient_attn.ops.routed.selected_tiles import Choice, Options, attend
from efficient_attn.ops.softmax.stats import Stats
from efficient_attn.values import ConfigError

# Logits, and numbers of the outputs of pairs, that are held at once.
BUDGET = 1 << 22
PAIRS = 1 << 25
# Most queries of a tile.
ROWS = 128


def block_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  blocks: Int[Array, 'B T M J'],
  *,
  block_size: int,
  members: Int[Array, 'B M I C'] | None = None,
  bias: Callable[[Any, Any], Array] | None = None,
  query_marks: PyTree = (),
  key_marks: PyTree = (),
  scale: float | None = None,
) -> tuple[Float[Array, 'B T N V'], Stats, Stats]:
  """Softmax attention over the keys of `blocks`.

  Query head n reads kv head n // (N // K) and follows choice n // (N // M).

  Args:
    query: queries.
    key: keys.
    value: values.
    blocks: J different blocks of keys for every query, shared by the N / M
      heads of a group, K | M | N; -1 is no block.
    block_size: keys in a block, C.
    members: the keys of every block, -1 where there is none. None cuts the
      length into blocks, the last of which may be shorter.
    bias: bias(query marks [.., R, 1, *], key marks [.., 1, C, *]) -> [.., R, C]
      joins the logits; -inf hides a key. None admits every key.
    query_marks: tree of arrays [#B, T, #M, *], such as positions.
    key_marks: tree of arrays [#B, S, #K, *].
    scale: factor of the logits, H**-0.5 by default.

  Returns:
    The output in the query's dtype, 0 where a query has no key; its
    denominators [B, T, N] in at least float32; and those of every block alone,
    [B, T, N, J], which have no gradient.
  """
  B, T, N, H = query.shape
  S, K, V = value.shape[1:]
  M, J = blocks.shape[2:]
  _check(N, K, M, block_size)
  L, G, C = B * M, N // M, block_size
  number = -(-S // C) if members is None else members.shape[2]
  # So many chunks that the pairs of one have no more numbers than the queries.
  chunks = max(1, min(J, L * T * J * G * V // PAIRS))
  queries = -(-T // chunks)
  rows = tile_rows(queries * J, number, C)
  count = (queries * J + number * (rows - 1)) // rows
  steps = -(-count * L * rows * G * C // BUDGET)
  steps = min(steps, count)
  options = Options(
    scale=H**-0.5 if scale is None else scale,
    bias=bias,
    number=number,
    rows=rows,
    count=-(-count // steps) * steps,
    steps=steps,
    chunks=chunks,
    block_size=C,
    length=S,
  )

  def by_choice(x, fill=0):  # [#B, T, #M, *] to [B M, chunks * queries, *]
    x = jnp.broadcast_to(x, (B, T, M, *x.shape[3:]))
    x = jnp.moveaxis(x, 2, 1).reshape(L, T, *x.shape[3:])
    widths = [(0, 0)] * x.ndim
    widths[1] = 0, chunks * queries - T
    return jnp.pad(x, widths, constant_values=fill)

  def by_key(x):  # [#B, S, #K, *] to [B K, I, C, *] or [B K, S, *]
    x = jnp.broadcast_to(x, (B, S, K, *x.shape[3:]))
    x = jnp.moveaxis(x, 2, 1).reshape(B * K, S, *x.shape[3:])
    if members is None:
      widths = [(0, 0)] * x.ndim
      widths[1] = 0, number * C - S
      x = jnp.pad(x, widths).reshape(B * K, number, C, *x.shape[2:])
    return x

  choice = Choice(
    by_choice(blocks, -1),
    None if members is None else members.reshape(L, number, C),
    jax.tree.map(by_choice, query_marks),
    jax.tree.map(by_key, key_marks),
  )
  query = by_choice(query.reshape(B, T, M, G, H))
  found = attend(options, query, by_key(key), by_key(value), choice)

  def by_token(x):  # [B M, chunks * queries, G, *] to [B, T, N, *]
    x = x[:, :T].reshape(B, M, T, G, *x.shape[3:])
    return jnp.moveaxis(x, 1, 2).reshape(B, T, N, *x.shape[4:])

  out, stats, parts = jax.tree.map(by_token, found)
  return out, stats, lax.stop_gradient(parts)


def tile_rows(pairs: int, number: int, block_size: int) -> int:
  """The queries of a tile: a power of two, half of those that choose a block.

  So at most half as many pairs again are computed, and when decoding, with
  fewer pairs than blocks, no more than there are.
  """
  rows = max(1, min(pairs // (2 * number), block_size, ROWS))
  return 1 << rows.bit_length() - 1


def causal_bias(query: Int[Array, '...'], key: Int[Array, '...']) -> Array:
  """The bias of marks that are positions: 0 for keys up to the query."""
  return jnp.where(key <= query, 0.0, -jnp.inf)


def positions(length: int, offset: int | Int[Array, ''] = 0) -> Array:
  """Marks [1, T, 1] of `length` tokens that start at `offset`."""
  return (offset + jnp.arange(length, dtype=jnp.int32))[None, :, None]


def top_blocks(
  scores: Float[Array, '*rows I'],
  allowed: Bool[Array, '#*rows I'] | bool,
  top_k: int,
  *,
  forced: Bool[Array, '#*rows I'] | bool = False,
) -> Int[Array, '*rows J']:
  """The `top_k` allowed blocks of the highest scores, -1 where there are fewer.

  `forced` blocks come before all others. Among equal scores the lowest index
  wins. Gradients do not pass.
  """
  scores = jnp.where(forced, jnp.inf, jnp.where(allowed, scores, -jnp.inf))
  top_k = min(top_k, scores.shape[-1])
  values, index = lax.top_k(lax.stop_gradient(scores), top_k)
  return jnp.where(values > -jnp.inf, index, -1)


def _check(N, K, M, block_size):
  if N % M or M % K:
    raise ValueError(
      f'blocks has {M} choices for N = {N} query heads and K = {K} kv heads:'
      ' K must divide them and they must divide N.'
    )
  if block_size < 1:
    raise ConfigError(f'block_size is {block_size}; it must be at least 1.')
