"""Unit lower triangular systems by doubling, for the chunkwise delta rule.

(I + L) U = R with L strictly lower is solved through the inverse, which is
built from those of its diagonal blocks,

  [A  0]^-1   [    A^-1        0  ]
  [B  D]    = [-D^-1 B A^-1  D^-1 ],

for blocks of 1, 2, 4, ... rows: log2(C) batched matrix products where forward
substitution takes C steps. One step of refinement then brings the error down
to that of substitution, 2 to 3 times less where keys resemble each other.
`wide` takes the same steps by products of whole matrices, whose other blocks
are zero: more work, but none of it on the small blocks that a matrix unit is
slow with.
(The product of I + (-L)^(2^i) needs as many products, but its powers are huge
where keys repeat, and cancel.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from efficient_attn.ops.recurrent import gates


def _matmul(x, y, precision=jax.lax.Precision.HIGHEST):
  return jnp.matmul(x, y, precision=precision)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def solve_unit_lower(
  lower: Float[Array, '*#batch C C'],
  rhs: Float[Array, '*batch C V'],
  wide: bool = False,
  refine: bool = True,
) -> Float[Array, '*batch C V']:
  """Returns U with (I + L) U = R.

  Args:
    lower: L, zero on and above the diagonal; C is a power of two. Its batch may
      be of size one where that of R is not.
    rhs: R.
    wide: whether the inverse is built from products of whole matrices.
    refine: whether the solution is refined, and all products are exact in
      float32. Operands that are rounded to bfloat16 afterwards need neither:
      24 bits in three products of 8 are enough.
  """
  return _solve(_inverse(lower, wide, refine), lower, rhs, refine)


@solve_unit_lower.defjvp
def _jvp(wide, refine, primals, tangents):
  lower, rhs = primals
  lower_dot, rhs_dot = tangents
  inverse = _inverse(lower, wide, refine)
  solution = _solve(inverse, lower, rhs, refine)
  change = rhs_dot - _matmul(lower_dot, solution, _precision(refine))
  return solution, _solve(inverse, lower, change, refine)


def _solve(inverse, lower, rhs, refine):
  first = _matmul(inverse, rhs, _precision(refine))
  if not refine:
    return first
  return first + _matmul(inverse, rhs - first - _matmul(lower, first))


def _precision(refine):
  return jax.lax.Precision.HIGHEST if refine else jax.lax.Precision.HIGH


def _inverse(lower, wide, refine):
  if wide:
    return _inverse_of_rows(lower, _precision(refine))
  size = lower.shape[-1]
  inverse = jnp.ones((*lower.shape[:-1], 1, 1), lower.dtype)
  rows = 1
  while rows < size:
    first, second = gates.halves(inverse)
    square = _matmul(second, _below_diagonal(lower, rows))
    inverse = gates.merge(inverse, -_matmul(square, first))
    rows *= 2
  return inverse[..., 0, :, :]


def _inverse_of_rows(lower, precision):
  size = lower.shape[-1]
  index = np.arange(size)
  eye = np.eye(size, dtype=lower.dtype)
  inverse = eye
  for level in range(size.bit_length() - 1):
    block = index >> level
    squares = (block[:, None] % 2 == 1) & (block[:, None] == block + 1)
    change = jnp.where(squares, lower, 0)
    if level:
      change = _matmul(inverse, change, precision)
      change = _matmul(change, inverse, precision)
    inverse = inverse - change
  return jnp.broadcast_to(inverse, lower.shape)


def _below_diagonal(matrix, rows):
  """The blocks (2i + 1, 2i) of `rows` rows, [*batch, C / (2 rows), m, m]."""
  pairs = matrix.shape[-1] // (2 * rows)
  blocks = matrix.reshape(*matrix.shape[:-2], pairs, 2 * rows, pairs, 2 * rows)
  diagonal = jnp.diagonal(blocks, axis1=-4, axis2=-2)
  return jnp.moveaxis(diagonal, -1, -3)[..., rows:, :rows]
