"""The circumstances of tokens, handed to every mixer beside them."""

import chex
import jax
import jax.numpy as jnp

# No product of two such numbers and a few hundred channels overflows.
LARGEST = 1e18


@chex.dataclass(frozen=True)
class Context:
  """The circumstances of tokens x [B, T, D], the same for all layers.

  A stack hands it down: its layers close over it, so that it is not in the
  carry of their scan and the grid stays a tuple of numbers.

  Attributes:
    positions: [T] or [B, T] int32; None: counted from the start, or from what
      the cache has seen.
    segment_ids: [B, T] int32, which keep packed sequences apart: one ends where
      the id changes. Tokens of id 0 are padding and may hold anything.
    grid: the axes of the tokens in row-major order, as (height, width) of an
      image; () for a sequence.
    memory: [B, S, D], what cross-attention reads.
    memory_ids: [B, S] int32, the segment ids of the memory; a token reads what
      has its own id, without ids of its own all but padding.
  """

  positions: jax.Array | None = None
  segment_ids: jax.Array | None = None
  grid: tuple[int, ...] = ()
  memory: jax.Array | None = None
  memory_ids: jax.Array | None = None

  def without_padding(self, x: jax.Array, entirely: bool = False) -> jax.Array:
    """Zeroes what padding holds of x [B, T, D] that no product survives.

    Padding is a segment of its own, so that no weight and no state leads from
    it to another token. Yet 0 NaN is NaN, in the products of a tile and in the
    gradients of the parameters: NaN, infinities and numbers past 1e18 end here.
    Other numbers stay, and with them a sequence whose id happens to be 0;
    unless `entirely`, so that a call that ends in padding leaves nothing to
    the next one.
    """
    if self.segment_ids is None:
      return x
    if entirely:
      return jnp.where((self.segment_ids == 0)[..., None], 0, x)
    usual = jnp.abs(x.astype(jnp.float32)) <= LARGEST
    return jnp.where((self.segment_ids == 0)[..., None] & ~usual, 0, x)
