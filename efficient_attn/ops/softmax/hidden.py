"""Queries, keys and values that a mask hides become zero.

A weight of exactly 0 does not hide a value: 0 NaN and 0 inf are NaN. What no
query may see, such as padding, therefore leaves before the products, and so
does a query that sees nothing, which would reach the gradients of the keys.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from efficient_attn.ops import masks


def may_hide(mask: masks.Mask | None, T: int, S: int) -> bool:
  """Tells if a query may see no key, or a key be seen by no query."""
  return mask is not None and not (T == S and mask.sees_itself())


def without_hidden(
  admitted: Bool[Array, '#B #K #R S'],
  query: Float[Array, 'B K R H'],
  key: Float[Array, 'B K S H'],
  value: Float[Array, 'B K S V'],
) -> tuple[
  Float[Array, 'B K R H'], Float[Array, 'B K S H'], Float[Array, 'B K S V']
]:
  """Zeroes rows that see no key, and keys and values that no row sees."""
  sees = jnp.any(admitted, axis=3)[..., None]
  seen = jnp.any(admitted, axis=2)[..., None]
  return (
    jnp.where(sees, query, 0),
    jnp.where(seen, key, 0),
    jnp.where(seen, value, 0),
  )
