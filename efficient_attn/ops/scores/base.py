# ruff: noqa: D102 (an override keeps the contract its base documents)
"""The contract of a score modifier, and sums of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import masks


class Score:
  """Base of score modifiers; a subclass needs only `tile` or `in_tile`.

  Attributes:
    kernel_lacks: why kernels, which take `in_kernel`, cannot evaluate it; None
      where they can.
    fixed: names of arrays of floats that are not learned.
  """

  kernel_lacks: str | None = 'no rule for one tile of a kernel'
  fixed: frozenset[str] = frozenset()

  def in_kernel(self, T: int, S: int) -> Score:
    """The same with an `in_tile` of elementwise operations.

    No learned array of it has both T and S.
    """
    return self

  def in_tile(
    self, query: Int[Array, '*#tile'], key: Int[Array, '*#tile']
  ) -> Float[Array, '*#tile']:
    """The term of a tile, of a modifier whose arrays are cut to it.

    Takes indices as `masks.Mask.in_tile` does.
    """
    raise NotImplementedError(f'{type(self).__name__} does not define in_tile')

  def tile(
    self, rows: Int[Array, 'R'], cols: Int[Array, 'C']
  ) -> Float[Array, '#B #N R C']:
    """Returns what is added to the logits of one tile.

    Args:
      rows: consecutive query indices, all inside [0, T).
      cols: consecutive key indices, all inside [0, S).

    Returns:
      The term, broadcastable to [B, N, R, C].
    """
    found = masks.cut(self, rows, cols).in_tile(
      rows[None, None, :, None], cols[None, None, None, :]
    )
    return jnp.broadcast_to(found, found.shape[:2] + (rows.size, cols.size))

  def dense(self, T: int, S: int) -> Float[Array, '#B #N T S']:
    """The whole term, broadcastable to [B, N, T, S]."""
    return self.tile(jnp.arange(T), jnp.arange(S))

  def accumulate(
    self,
    total: Score,
    rows: Int[Array, 'R'],
    cols: Int[Array, 'C'],
    cotangent: Float[Array, 'B N R C'],
  ) -> Score:
    """Adds one tile's gradient to `total`, an expression of the same form."""
    tile, pull = jax.vjp(lambda score: score.tile(rows, cols), self)
    (gradient,) = pull(sum_to(cotangent, tile.shape).astype(tile.dtype))

    def add(so_far, new):
      # Integer leaves (an offset) have cotangents of dtype float0.
      return so_far if new.dtype == jax.dtypes.float0 else so_far + new

    return jax.tree.map(add, total, gradient)

  def __add__(self, other: Score) -> Score:
    return Sum(self, other) if isinstance(other, Score) else NotImplemented


def sum_to(array: Array, shape: tuple[int, ...]) -> Array:
  """Sums a rank-4 array over the axes where `shape` is 1."""
  axes = tuple(
    axis
    for axis, (size, wanted) in enumerate(zip(array.shape, shape, strict=True))
    if wanted == 1 and size != 1
  )
  return jnp.sum(array, axes, keepdims=True)


@masks.expression
class Sum(Score):
  """The sum of two modifiers."""

  left: Score
  right: Score

  @property
  def kernel_lacks(self):
    for part in (self.left, self.right):
      if part.kernel_lacks:
        return f'{type(part).__name__}, which has {part.kernel_lacks}'
    return None

  def in_kernel(self, T, S):
    return Sum(self.left.in_kernel(T, S), self.right.in_kernel(T, S))

  def in_tile(self, query, key):
    return self.left.in_tile(query, key) + self.right.in_tile(query, key)

  def tile(self, rows, cols):
    return self.left.tile(rows, cols) + self.right.tile(rows, cols)

  def dense(self, T, S):
    return self.left.dense(T, S) + self.right.dense(T, S)

  def accumulate(self, total, rows, cols, cotangent):
    return Sum(
      self.left.accumulate(total.left, rows, cols, cotangent),
      self.right.accumulate(total.right, rows, cols, cotangent),
    )
