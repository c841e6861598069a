"""Rows of a batch that start and end at different times.

Until a row is replaced, the rows of a batch share one cursor. `apart` gives
each row a cache of its own, stacked, so that one row can start again while the
others go on:

  rows = apart(model, cache, batch)
  logits, first = model(prompt, cache=model.init_cache(1, max_len))  # [1, P]
  rows = insert(rows, i, first)
  logits, rows = step(model, tokens, rows)

On one device: rows are not sharded.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.models.trunk import LMCache


def apart(model: nnx.Module, cache: LMCache, batch: int) -> LMCache:
  """Returns caches of one row each, with the rows as the first axis."""

  def split(layers: int):
    """For arrays with leading axes of layers; counters have no rows yet."""

    def leaf(x):
      if x.ndim == layers:
        return jnp.broadcast_to(x, (batch, *x.shape))
      return jnp.expand_dims(jnp.moveaxis(x, layers, 0), layers + 1)

    return leaf

  first, periods, rest = cache.layers
  periods = jax.tree.map(split(int(model.stack.scan)), periods)
  first, rest, cursor = jax.tree.map(split(0), (first, rest, cache.cursor))
  return LMCache(layers=(first, periods, rest), cursor=cursor)


def insert(rows: LMCache, row: int, cache: LMCache) -> LMCache:
  """Puts the cache of a batch of one in place of a row's.

  A row that has no prompt yet gets an empty cache. The cache has room for as
  many tokens as those of the rows.
  """

  def put(leaf, new):
    return leaf.at[row].set(new)

  return jax.tree.map(put, rows, cache)


def step(model: nnx.Module, tokens: jax.Array, rows: LMCache) -> Any:
  """Reads one token [B] of each row; returns logits [B, vocab] and the rows."""

  def one(token, cache):
    logits, cache = model(token[None, None], cache=cache)
    return logits[0, -1], cache

  return jax.vmap(one)(tokens, rows)
