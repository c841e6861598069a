"""Tokens that are padding: those of segment id 0."""

import jax
import jax.numpy as jnp

# No product of two such numbers and a few hundred channels overflows.
LARGEST = 1e18


def without_padding(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Zeroes what padding holds of x [B, T, D] that no product survives.

  Padding is a segment of its own, so that no weight and no state leads from it
  to another token. Yet 0 NaN is NaN, in the products of a tile and in the
  gradients of the parameters: NaN, infinities and numbers past 1e18 end here.
  Other numbers stay, and with them a sequence whose id happens to be 0.
  """
  if segment_ids is None:
    return x
  usual = jnp.abs(x.astype(jnp.float32)) <= LARGEST
  return jnp.where((segment_ids == 0)[..., None] & ~usual, 0, x)
