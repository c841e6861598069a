"""Softmax statistics: the largest logit and the sum of weights, kept apart.

The denominator of a row, sum_s e^(z_s), is `total` e^`top`. Its logarithm
top + log(total) rounds log(total) away once logits are large: at |z| = 1e9 the
next float32 is 64 away. Whatever uses a denominator again, a backward pass or
a merge of pieces, therefore takes both numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Stats(NamedTuple):
  """The denominators of rows.

  Attributes:
    top: the largest logit, 0 for a row without any. It has no gradient: what
      is computed of a denominator changes with `total` alone.
    total: the sum of e^(z - top), 0 for a row without any logit.
  """

  top: Float[Array, '*rows']
  total: Float[Array, '*rows']

  @property
  def lse(self) -> Float[Array, '*rows']:
    """The log denominator; -inf for a row without any logit."""
    nothing = self.total == 0
    log = jnp.log(jnp.where(nothing, 1, self.total))
    return jnp.where(nothing, -jnp.inf, lax.stop_gradient(self.top) + log)

  def divide(self, x: Float[Array, '*rows V']) -> Float[Array, '*rows V']:
    """Divides sums of e^(z - top) v by the denominator; 0 stays 0."""
    return x / jnp.where(self.total == 0, 1, self.total)[..., None]


def largest(
  logits: Float[Array, '*rows S'], *others: Float[Array, '...']
) -> Float[Array, '*rows']:
  """The largest of logits and `others`, without gradient; 0 if all are -inf.

  The others are broadcast to the rows.
  """
  top = jnp.max(logits, axis=-1)
  for other in others:
    top = jnp.maximum(top, other)
  return lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))


def exp_below(z: jax.Array, top: jax.Array) -> jax.Array:
  """e^(z - top) for z <= top, with its gradient.

  A compiler may make the logits anew where they are read, fused into one
  multiply-add and so rounded otherwise than where the largest was found: at
  |z| = 1e9 by up to 64, whose exponential would overflow.
  """
  z = z - top
  return jnp.exp(z - lax.stop_gradient(jnp.maximum(z, 0)))
