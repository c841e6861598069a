"""The orthogonalising step of Muon, used inside LaCT.

A quintic Newton-Schulz iteration, X <- a X + b (X X^T) X + c (X X^T)^2 X with
the coefficients of Jordan et al. (2024), drives the singular values of G to
about 1 (between 0.7 and 1.2), from those of G / |G|_F <= 1. O(steps m n
min(m, n)) time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(
  g: Float[Array, '*B m n'], *, steps: int = 5
) -> Float[Array, '*B m n']:
  """Returns about U V^T of g = U S V^T; zero stays zero."""
  a, b, c = COEFFICIENTS
  x = g / safe_norm(g, (-2, -1))
  wide = x.shape[-2] <= x.shape[-1]
  if not wide:
    x = jnp.swapaxes(x, -2, -1)

  def step(_, x):
    gram = x @ jnp.swapaxes(x, -2, -1)
    return a * x + (b * gram + c * gram @ gram) @ x

  x = jax.lax.fori_loop(0, steps, step, x)
  return x if wide else jnp.swapaxes(x, -2, -1)


def safe_norm(x: Array, axis: int | tuple[int, ...]) -> Array:
  """|x| over axes that stay, 1 (with a zero gradient) where x is zero."""
  # Squares of parts of the largest entry neither overflow nor vanish.
  top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True))
  top = jnp.where(top == 0, 1, top)
  square = jnp.sum((x / top) ** 2, axis, keepdims=True)
  return top * jnp.sqrt(jnp.where(square == 0, 1, square))
