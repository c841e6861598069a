"""Feature maps of linear attention that have no parameters.

phi(q) . phi(k) stands for the kernel exp(q . k). A map that is positive
keeps the denominator of normalised linear attention away from zero.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def elu_plus_one(x: Float[Array, '...']) -> Float[Array, '...']:
  """elu(x) + 1: exp(x) below zero, x + 1 above (Katharopoulos, 2006.16236)."""
  # As printed, exp(x) - 1 + 1 loses small features to rounding.
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def identity(x: Float[Array, '...']) -> Float[Array, '...']:
  """No feature map: the plain bilinear kernel q . k."""
  return x


FEATURE_MAPS = {
  'elu_plus_one': elu_plus_one,
  'identity': identity,
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
}
