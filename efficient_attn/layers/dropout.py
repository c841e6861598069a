"""Dropout with an explicit key: a stateful one repeats its mask under jit."""

import jax
import jax.numpy as jnp

from efficient_attn import sharding


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of x and scales the rest; no key: unchanged."""
  if key is None or rate == 0:
    return x
  # Each device draws its own part of the mask.
  layout = sharding.current(jax.typeof(x).sharding)
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=layout)
  return jnp.where(keep, x / (1 - rate), 0)
