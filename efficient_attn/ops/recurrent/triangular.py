"""Unit lower triangular systems by doubling, for the chunkwise delta rule.

(I + L) U = R with L strictly lower is solved through the inverse, which is
built from those of its diagonal blocks,

  [A  0]^-1   [    A^-1        0  ]
  [B  D]    = [-D^-1 B A^-1  D^-1 ],

for blocks of 1, 2, 4, ... rows: log2(C) batched matrix products where forward
substitution takes C steps. One step of refinement then brings the error down
to that of substitution, 2 to 3 times less where keys resemble each other.
(The product of I + (-L)^(2^i) needs as many products, but its powers are huge
where keys repeat, and cancel.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.ops.recurrent import gates


def _matmul(x, y):
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def solve_unit_lower(
  lower: Float[Array, '*#batch C C'], rhs: Float[Array, '*batch C V']
) -> Float[Array, '*batch C V']:
  """Returns U with (I + L) U = R.

  Args:
    lower: L, zero on and above the diagonal; C is a power of two. Its batch may
      be of size one where that of R is not.
    rhs: R.
  """
  return _solve(_inverse(lower), lower, rhs)


@solve_unit_lower.defjvp
def _jvp(primals, tangents):
  lower, rhs = primals
  lower_dot, rhs_dot = tangents
  inverse = _inverse(lower)
  solution = _solve(inverse, lower, rhs)
  change = rhs_dot - _matmul(lower_dot, solution)
  return solution, _solve(inverse, lower, change)


def _solve(inverse, lower, rhs):
  first = _matmul(inverse, rhs)
  return first + _matmul(inverse, rhs - first - _matmul(lower, first))


def _inverse(lower):
  size = lower.shape[-1]
  inverse = jnp.ones((*lower.shape[:-1], 1, 1), lower.dtype)
  rows = 1
  while rows < size:
    first, second = gates.halves(inverse)
    square = _matmul(second, _below_diagonal(lower, rows))
    inverse = gates.merge(inverse, -_matmul(square, first))
    rows *= 2
  return inverse[..., 0, :, :]


def _below_diagonal(matrix, rows):
  """The blocks (2i + 1, 2i) of `rows` rows, [*batch, C / (2 rows), m, m]."""
  pairs = matrix.shape[-1] // (2 * rows)
  blocks = matrix.reshape(*matrix.shape[:-2], pairs, 2 * rows, pairs, 2 * rows)
  diagonal = jnp.diagonal(blocks, axis1=-4, axis2=-2)
  return jnp.moveaxis(diagonal, -1, -3)[..., rows:, :rows]
