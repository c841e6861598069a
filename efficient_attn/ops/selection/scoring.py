"""What selectors share: pooled scores, and the best of them.

Scores are [B, N, T, S], heads before positions as in masks, in at least
float32. Queries are the last T of the S positions, so that one rule serves a
prompt (T = S) and a step of decoding (T = 1).
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention_with_stats
from efficient_attn.ops.softmax.normalizers import softmax
from efficient_attn.ops.softmax.score_functions import scaled_dot
from efficient_attn.ops.softmax.stats import exp_below


def causal(query: Array, key: Array) -> masks.Mask:
  """Causality of the last T of S positions; checks the arrays on the way."""
  (T, N), (S, K) = query.shape[1:3], key.shape[1:3]
  if T > S or N % K or query.shape[-1] != key.shape[-1]:
    raise ValueError(
      f'query of shape {query.shape} and key of shape {key.shape} must be'
      ' [B, T, N, H] and [B, S, K, H] with T <= S and N a multiple of K: pass'
      ' the keys of the queries too.'
    )
  return masks.Causal(S - T)


def logits(
  query: Float[Array, 'B T N H'], key: Float[Array, 'B S K H']
) -> Float[Array, 'B N T S']:
  """q_t . k_s / sqrt(H)."""
  groups = query.shape[2] // key.shape[2]
  return scaled_dot(query, jnp.repeat(key, groups, axis=2))


def probabilities(
  query: Float[Array, 'B T N H'], key: Float[Array, 'B S K H']
) -> Float[Array, 'B N T S']:
  """The causal attention of the last T queries."""
  T, S = query.shape[1], key.shape[1]
  return softmax(logits(query, key), causal(query, key).dense(T, S))


def pool(x: Float[Array, 'B T N H'], size: int) -> Float[Array, 'B I N H']:
  """The mean of every `size` tokens."""
  B, T, *rest = x.shape
  divide(T, size)
  return x.reshape(B, T // size, size, *rest).mean(2)


def divide(length: int, size: int) -> int:
  """How many blocks there are; they must come out even."""
  if size < 1 or length % size:
    raise ValueError(
      f'blocks of {size} do not divide {length} tokens: pass a size that does,'
      ' or pad.'
    )
  return length // size


def top(scores: Float[Array, '*rows S'], count: int) -> Bool[Array, '*rows S']:
  """True for the `count` largest of a row, the first among equals.

  What scores -inf is never chosen.
  """
  _, index = lax.top_k(scores, max(min(count, scores.shape[-1]), 0))
  chosen = jnp.zeros(scores.shape, bool)
  chosen = jnp.put_along_axis(chosen, index, True, axis=-1, inplace=False)
  return chosen & (scores > -jnp.inf)


def cover(
  weights: Float[Array, '*rows S'], share: float | int
) -> Bool[Array, '*rows S']:
  """True for the fewest largest of a row that sum to `share` of it.

  A share of 1 is everything, also what rounding would leave out.
  """
  if share >= 1:
    return jnp.ones(weights.shape, bool)
  order = jnp.argsort(-weights, axis=-1, stable=True)
  ranked = jnp.take_along_axis(weights, order, axis=-1)
  before = jnp.cumsum(ranked, axis=-1) - ranked
  chosen = before < share * weights.sum(-1, keepdims=True)
  return jnp.put_along_axis(
    jnp.zeros(weights.shape, bool), order, chosen, axis=-1, inplace=False
  )


def over_map(choose, scores: Float[Array, 'B N I J'], amount):
  """`choose(scores, amount)` over the whole map at once, not row by row.

  The best of every row is chosen too, so that no query is left without keys.
  """
  flat = scores.reshape(*scores.shape[:2], -1)
  chosen = choose(flat, amount).reshape(scores.shape)
  return chosen | top(scores, 1)


def tiles(
  T: int, S: int, block_q: int, block_k: int
) -> tuple[Bool[np.ndarray, 'I J'], Bool[np.ndarray, 'I J']]:
  """The tiles that causality admits, and those with a query's own position."""
  divide(T, block_q), divide(S, block_k)
  sizes = T, S, block_q, block_k
  seen = masks.Causal(S - T).block_map(*sizes) != masks.EMPTY
  own = masks.Window(0, 0, S - T).block_map(*sizes) != masks.EMPTY
  return seen, own


def count(share: float | int, total: int) -> int:
  """`share` of `total`, rounded up, at least one."""
  return max(math.ceil(share * total), 1)


def retained_mass(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  mask: masks.Mask,
  base: masks.Mask | None = None,
) -> Float[Array, 'B T N']:
  """The share of the softmax that `mask` keeps of what `base` admits."""

  def denominator(mask):
    value = jnp.zeros((*key.shape[:3], 1), key.dtype)
    return attention_with_stats(query, key, value, mask=mask)[1]

  kept, whole = denominator(mask), denominator(base)
  return kept.total * exp_below(kept.top, whole.top) / whole.total
