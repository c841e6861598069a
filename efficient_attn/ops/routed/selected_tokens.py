"""Attention of every query to the `top_k` tokens of the highest scores.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s,   s in the top_k of score_t

which DeepSeek's sparse attention and HashAttention share. One chunk of queries
is scored, chosen for and attended at a time: O(T top_k H) time beside that of
the scores, and O(T H) memory for chunks whose scores and chosen keys fit
`BUDGET`. What is chosen has no gradient, so that scores learn only from

    KL(p_t || softmax(score_t)),   p_t the mean of the weights over the heads

over the chosen tokens, as the indexer of DeepSeek-V3.2 does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from efficient_attn.ops.products import product
from efficient_attn.ops.softmax.normalizers import softmax
from efficient_attn.values import ConfigError

# Scores, or numbers of chosen keys, that are held at once.
BUDGET = 1 << 24


def token_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  score: Callable[[Any], Array],
  query_marks: PyTree,
  *,
  top_k: int,
  scale: float | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T M']]:
  """Softmax attention over the best tokens.

  Query head n reads kv head n // (N // K) and follows score n // (N // M).

  Args:
    query: queries.
    key: keys.
    value: values.
    score: maps the marks of C queries, [B, C, *], to scores [B, M, C, S], -inf
      for keys that may not be chosen; M = 1 or K | M | N. Ties go to the
      lowest index.
    query_marks: tree of arrays [B, T, *].
    top_k: tokens of a query.
    scale: factor of the logits, H**-0.5 by default.

  Returns:
    The output in the query's dtype, zeros where there is no key, and the loss
    from which the scores learn.
  """
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  if top_k < 1:
    raise ConfigError(f'top_k is {top_k}; it must be at least 1.')
  top_k = min(top_k, S)
  scale = H**-0.5 if scale is None else scale
  marks = jax.tree.map(lambda x: x[:, :1], query_marks)
  M = jax.eval_shape(score, marks).shape[1]
  heads = max(M, K)
  size = BUDGET // (B * max(M * S, heads * top_k * H))
  size = max(1, min(size, T))
  number = -(-T // size)
  size = -(-T // number)

  def by_head(x):  # [B, S, K, *] to [B, heads, S, *]
    return jnp.repeat(jnp.moveaxis(x, 2, 1), heads // K, axis=1)

  take = jax.vmap(jax.vmap(lambda x, i: x[i]))
  keys, values = by_head(key), by_head(value)

  def attend(chunk):
    query, marks = chunk
    stats = jnp.promote_types(query.dtype, jnp.float32)
    scores = score(marks)
    best, index = lax.top_k(lax.stop_gradient(scores), top_k)
    there = best > -jnp.inf  # [B, M, C, top_k]

    def each(x):  # of the scores' heads to those of the chosen keys
      return jnp.broadcast_to(x, (B, heads, *x.shape[2:])) if M == 1 else x

    chosen = take(keys, each(index))
    query = query.reshape(B, size, heads, N // heads, H)
    logits = scale * product('bcmgh,bmcjh->bmcgj', query, chosen)
    weights = softmax(logits, each(there)[..., None, :])
    out = product(
      'bmcgj,bmcjv->bcmgv',
      weights,
      take(values, each(index)),
      operand=value.dtype,
    )
    target = lax.stop_gradient(weights).reshape(B, M, -1, *weights.shape[2:])
    target = jnp.mean(target, (2, 4))
    found = jnp.take_along_axis(scores, index, -1).astype(stats)
    loss = divergence(target, found, there)
    out = out.reshape(B, size, N, -1).astype(query.dtype)
    return out, jnp.moveaxis(loss, 1, 2)

  def chunks(x):  # [B, T, *] to [number, B, size, *]
    widths = [(0, 0), (0, number * size - T)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths).reshape(B, number, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  parts = jax.tree.map(chunks, (query, query_marks))
  if number == 1:
    return attend(jax.tree.map(lambda x: x[0], parts))
  out, loss = lax.map(jax.checkpoint(attend), parts)
  out, loss = (
    jnp.moveaxis(x, 0, 1).reshape(B, number * size, *x.shape[3:])[:, :T]
    for x in (out, loss)
  )
  return out, loss


def divergence(
  target: Float[Array, '*rows J'], scores: Float[Array, '*rows J'], there
) -> Float[Array, '*rows']:
  """KL(target || softmax(scores)) over what is `there`."""
  scores = jnp.where(there, scores, 0)
  shift = lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
  total = jnp.sum(jnp.where(there, jnp.exp(scores - shift), 0), -1)
  log_total = jnp.log(jnp.where(total == 0, 1, total))[..., None] + shift
  entropy = target * jnp.log(jnp.where(target > 0, target, 1))
  return jnp.sum(entropy - target * jnp.where(there, scores - log_total, 0), -1)
