"""Tokens that are padding: those of segment id 0."""

import jax
import jax.numpy as jnp


def without_padding(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Zeroes the tokens of segment id 0 of x [B, T, D].

  Padding is a segment of its own, so that no weight and no state leads from it
  to another token. Yet 0 NaN is NaN, in the products of a tile and in the
  gradients of the parameters: whatever padding holds ends here.
  """
  if segment_ids is None:
    return x
  return jnp.where((segment_ids == 0)[..., None], 0, x)
