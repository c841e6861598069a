"""What mixers and models do with a cache of what came before."""

import jax
import jax.numpy as jnp


def next_positions(cache, length: int) -> jax.Array:
  """Returns the positions of `length` new tokens after what `cache` has seen.

  Without a cache they count from 0; with one, from its entry 'length'.
  """
  return (0 if cache is None else cache['length']) + jnp.arange(length)


def check_cacheable(causal: bool, segment_ids) -> None:
  """Raises where past keys and values cannot be continued."""
  if not causal or segment_ids is not None:
    raise NotImplementedError(
      'a cache needs causal attention and unpacked sequences'
    )


def empty_keys(batch: int, length: int, heads: tuple[int, int], dtype) -> dict:
  """Returns room for `length` keys and values [B, length, *heads].

  Each has a buffer of its own, so that a step can donate the cache.
  """
  shape = (batch, length, *heads)
  return dict(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    length=jnp.zeros((), jnp.int32),
  )


def extend(cache, key, value):
  """Returns all keys and values, the cache that holds them, and the offset."""
  if cache is None:
    return key, value, None, 0
  offset = cache['length']
  length = offset + key.shape[1]
  key = append(cache['key'], key, offset)
  value = append(cache['value'], value, offset)
  cache = cache | dict(key=key, value=value, length=length)
  return key, value, cache, offset


def append(buffer: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
  """Writes `new` [B, T, ...] into `buffer` [B, M, ...] at position `start`."""
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, new.astype(buffer.dtype), start, axis=1
  )
