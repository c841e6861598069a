"""Sums and means over blocks of consecutive tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.values import ConfigError


def block_sums(
  x: Float[Array, 'B S *rest'], block_size: int
) -> Float[Array, 'B I *rest']:
  """Sums over blocks of the length, in at least float32."""
  stats = jnp.promote_types(x.dtype, jnp.float32)
  number = -(-x.shape[1] // block_size)
  rest = [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, ((0, 0), (0, number * block_size - x.shape[1]), *rest))
  x = x.reshape(x.shape[0], number, block_size, *x.shape[2:])
  return jnp.sum(x, 2, dtype=stats)


def block_lengths(length: int, block_size: int) -> Int[Array, 'I']:
  """How many of `length` tokens each block holds: the last may hold fewer."""
  starts = jnp.arange(0, length, block_size)
  return jnp.minimum(length - starts, block_size)


def block_means(
  x: Float[Array, 'B S *rest'], block_size: int
) -> Float[Array, 'B I *rest']:
  """The mean of every block, in at least float32."""
  lengths = block_lengths(x.shape[1], block_size)
  return block_sums(x, block_size) / jnp.expand_dims(
    lengths, range(1, x.ndim - 1)
  )


def mean_pool(x: Float[Array, 'B T ...'], size: int) -> Float[Array, 'B P ...']:
  """`block_means` in the dtype of x: P = ceil(T / size) means."""
  if size < 1:
    raise ConfigError(f'size = {size}: pool 1 or more tokens.')
  return block_means(x, size).astype(x.dtype)


def repeat(x: Float[Array, 'B P ...'], size: int, length: int) -> Array:
  """Every entry `size` times, up to `length`: what a pool made shorter."""
  B, P, *rest = x.shape
  x = jnp.broadcast_to(x[:, :, None], (B, P, size, *rest))
  return x.reshape(B, P * size, *rest)[:, :length]
