# ruff: noqa: D102 (an override keeps the contract its base documents)
"""The contract of a mask, and `&`, `|` and `~`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int8, Integer

from efficient_attn.ops.masks.expression import cut, expression

EMPTY, PARTIAL, FULL = 0, 1, 2


class Mask:
  """Base of mask expressions; a subclass needs only `tile` or `pairs`.

  Attributes:
    relative: whether it depends on key - query alone, and so holds inside a
      packed segment as it does in a whole sequence.
  """

  relative = False

  def pairs(
    self, query: Integer[Array, '#B #N #T 1'], key: Integer[Array, '#B #N 1 #S']
  ) -> Bool[Array, '#B #N T S']:
    """Whether a query at one position may see a key at another.

    Takes numpy arrays to numpy arrays, and traced ones to traced ones.
    """
    raise NotImplementedError(
      f'masks.{type(self).__name__} is not a rule on two positions'
    )

  def in_tile(
    self, query: Integer[Array, '*#tile'], key: Integer[Array, '*#tile']
  ) -> Bool[Array, '*#tile']:
    """Does what `pairs` does, of a mask whose arrays are cut to a tile.

    Takes the indices of one tile, all as [#B, #N, #R, #C], or as [#R, #C], the
    axes exchanged or not, of one head in a kernel.
    """
    return self.pairs(query, key)

  def tile(
    self, rows: Int[Array, 'R'], cols: Int[Array, 'C']
  ) -> Bool[Array, '#B #N R C']:
    """The mask of one tile.

    Args:
      rows: consecutive query indices, all inside [0, T).
      cols: consecutive key indices, all inside [0, S).

    Returns:
      True where the key is admitted, broadcastable to [B, N, R, C].
    """
    found = cut(self, rows, cols).in_tile(
      rows[None, None, :, None], cols[None, None, None, :]
    )
    return jnp.broadcast_to(found, found.shape[:2] + (rows.size, cols.size))

  def elementwise(self, T: int, S: int) -> Mask:
    """The same mask with an `in_tile` of elementwise operations."""
    return self

  def dense(self, T: int, S: int) -> Bool[Array, '#B #N T S']:
    """The whole mask, broadcastable to [B, N, T, S]."""
    return self.tile(jnp.arange(T), jnp.arange(S))

  def block_map(
    self, T: int, S: int, block_q: int, block_k: int
  ) -> Int8[np.ndarray, 'I J']:
    """EMPTY, PARTIAL or FULL for every tile, known at trace time.

    Sound rather than exact: a tile that depends on traced data is PARTIAL.
    """
    shape = (-(-T // block_q), -(-S // block_k))
    return np.full(shape, PARTIAL, np.int8)

  def maybe(
    self, rows: Int[Array, 'R'], cols: Int[Array, 'C']
  ) -> bool | Bool[Array, '']:
    """Whether a tile may admit anything, decided at run time.

    False must mean that no batch element and no head admits a pair. The
    Python value True means that there is nothing to decide.
    """
    return True

  def sees_itself(self) -> bool:
    """Whether, known at trace time, each query may see the key of its index."""
    return False

  def __and__(self, other: Mask) -> Mask:
    return And(self, other) if isinstance(other, Mask) else NotImplemented

  def __or__(self, other: Mask) -> Mask:
    return Or(self, other) if isinstance(other, Mask) else NotImplemented

  def __invert__(self) -> Mask:
    return Not(self)


class _Both(Mask):
  """A mask made of `left` and `right`."""

  def elementwise(self, T, S):
    return type(self)(self.left.elementwise(T, S), self.right.elementwise(T, S))

  @property
  def relative(self):
    return self.left.relative and self.right.relative


@expression
class And(_Both):
  """Admits what both admit."""

  left: Mask
  right: Mask

  def pairs(self, query, key):
    return self.left.pairs(query, key) & self.right.pairs(query, key)

  def in_tile(self, query, key):
    return self.left.in_tile(query, key) & self.right.in_tile(query, key)

  def tile(self, rows, cols):
    return self.left.tile(rows, cols) & self.right.tile(rows, cols)

  def dense(self, T, S):
    return self.left.dense(T, S) & self.right.dense(T, S)

  def block_map(self, T, S, block_q, block_k):
    return np.minimum(
      self.left.block_map(T, S, block_q, block_k),
      self.right.block_map(T, S, block_q, block_k),
    )

  def maybe(self, rows, cols):
    left, right = self.left.maybe(rows, cols), self.right.maybe(rows, cols)
    if left is True or right is True:
      return right if left is True else left
    return left & right

  def sees_itself(self):
    return self.left.sees_itself() and self.right.sees_itself()


@expression
class Or(_Both):
  """Admits what either admits."""

  left: Mask
  right: Mask

  def pairs(self, query, key):
    return self.left.pairs(query, key) | self.right.pairs(query, key)

  def in_tile(self, query, key):
    return self.left.in_tile(query, key) | self.right.in_tile(query, key)

  def tile(self, rows, cols):
    return self.left.tile(rows, cols) | self.right.tile(rows, cols)

  def dense(self, T, S):
    return self.left.dense(T, S) | self.right.dense(T, S)

  def block_map(self, T, S, block_q, block_k):
    return np.maximum(
      self.left.block_map(T, S, block_q, block_k),
      self.right.block_map(T, S, block_q, block_k),
    )

  def maybe(self, rows, cols):
    left, right = self.left.maybe(rows, cols), self.right.maybe(rows, cols)
    if left is True or right is True:
      return True
    return left | right

  def sees_itself(self):
    return self.left.sees_itself() or self.right.sees_itself()


@expression
class Not(Mask):
  """Admits what `mask` does not."""

  mask: Mask

  @property
  def relative(self):
    return self.mask.relative

  def elementwise(self, T, S):
    return Not(self.mask.elementwise(T, S))

  def pairs(self, query, key):
    return ~self.mask.pairs(query, key)

  def in_tile(self, query, key):
    return ~self.mask.in_tile(query, key)

  def tile(self, rows, cols):
    return ~self.mask.tile(rows, cols)

  def dense(self, T, S):
    return ~self.mask.dense(T, S)

  def block_map(self, T, S, block_q, block_k):
    return np.int8(FULL) - self.mask.block_map(T, S, block_q, block_k)
