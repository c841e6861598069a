"""Inverses of the unit triangular matrices of a chunk, I + A, by doubling.

Blocks of 8 rows are inverted by elimination, those of 16, 32, ... by

  [A11   0 ]^-1   [      A11^-1            0   ]
  [A21  A22]    = [-A22^-1 A21 A11^-1   A22^-1 ],

or its mirror image where A is upper triangular. All blocks of the inverse of a
delta rule are products of reflections, and so stay small, where the powers of A
in a Neumann series grow with the chunk. Matrices are lists over heads, so that
their chains of products interleave.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.layout import CHUNK, products

LEAF = 8  # rows of a tile


def inverses(
  matrices: list[jax.Array], operand: jnp.dtype, *, upper: bool = False
) -> list[jax.Array]:
  """(I + A)^-1, float32.

  Args:
    matrices: A [C, C], float32, of which only the strict triangle is read.
    operand: of the matrix products.
    upper: whether A is upper triangular, else lower.
  """
  found = [_spread(x) for x in _leaves(matrices, upper)]
  size = LEAF
  while size < CHUNK:
    found = _double(found, matrices, size, operand, upper)
    size *= 2
  return found


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _block(index, size):
  """The block of `size` that an index, which is not negative, is in."""
  return jax.lax.div(index, jnp.int32(size))


def _leaves(matrices, upper):
  """Inverses of blocks of LEAF rows, beside each other: [LEAF, C]."""
  shape = (LEAF, CHUNK)
  row, lane = _iota(shape, 0), _iota(shape, 1)
  block_of = _block(lane, LEAF)
  column = lane - LEAF * block_of
  triangle = row < column if upper else row > column
  blocks = []
  for matrix in matrices:
    block = matrix[:LEAF]
    for i in range(1, CHUNK // LEAF):
      rows = matrix[i * LEAF : (i + 1) * LEAF]
      block = jnp.where(block_of == i, rows, block)
    blocks.append(jnp.where(triangle, block, 0))
  found = [jnp.where(row == column, 1.0, 0.0)] * len(matrices)
  for i in range(LEAF - 1, 0, -1) if upper else range(LEAF - 1):
    for head, block in enumerate(blocks):
      x = found[head]
      found[head] = x - _over_block(block, column, i) * x[i : i + 1]
  return found


def _over_block(blocks, column, i):
  """Column i of every block in all of its columns."""
  x = jnp.where(column == i, blocks, 0)
  if i:
    x = pltpu.roll(x, CHUNK - i, 1)
  width = 1
  while width < LEAF:
    x = x + pltpu.roll(x, width, 1)
    width *= 2
  return x


def _spread(x):
  """Blocks beside each other [LEAF, C] to the diagonal of [C, C]."""
  block = _block(_iota(x.shape, 1), LEAF)
  return jnp.concatenate(
    [jnp.where(block == i, x, 0) for i in range(CHUNK // LEAF)]
  )


def _halves(x, size):
  """The rows of first and of second halves of blocks of 2 `size` rows."""
  x = x.reshape(-1, 2, size, x.shape[-1])
  return x[:, 0].reshape(-1, x.shape[-1]), x[:, 1].reshape(-1, x.shape[-1])


def _joined(first, second, size):
  """The inverse of `_halves`."""
  parts = [x.reshape(-1, 1, size, x.shape[-1]) for x in (first, second)]
  return jnp.concatenate(parts, 1).reshape(-1, first.shape[-1])


def _double(found, matrices, size, operand, upper):
  """From the inverses of blocks of `size` rows to those of twice as many."""
  dot = products(operand)
  half = (CHUNK // 2, CHUNK)
  pair, block = (_block(_iota(half, i), size) for i in (0, 1))
  inside = block == 2 * pair + upper
  lower = not upper
  zeros = jnp.zeros(half, jnp.float32)
  halves = [_halves(x, size) for x in found]
  beside = []
  for matrix in matrices:
    rows = jnp.where(inside, _halves(matrix, size)[lower], 0)
    pieces = (zeros, rows) if lower else (rows, zeros)
    beside.append(_joined(*pieces, size))
  rows = [
    dot(dot(own[lower], between), x)
    for own, between, x in zip(halves, beside, found, strict=True)
  ]
  joined = []
  for (first, second), change in zip(halves, rows, strict=True):
    if lower:
      second = second - change
    else:
      first = first - change
    joined.append(_joined(first, second, size))
  return joined
