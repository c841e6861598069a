# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Masks that depend on the distance key - query alone."""

import numbers

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from efficient_attn.ops.masks.algebra import EMPTY, FULL, PARTIAL, Mask
from efficient_attn.ops.masks.expression import expression

Offset = int | Integer[Array, ''] | Integer[Array, 'B']


class Distance(Mask):
  """Base of rules on key - (query + offset); a subclass needs `admits`."""

  relative = True
  offset: Offset = 0
  axes = {'offset': 'B'}

  def admits(self, distance):
    """Whether a key this far after the query is admitted, elementwise."""
    raise NotImplementedError(f'{type(self).__name__} does not define admits')

  def pairs(self, query, key):
    offset = self.offset
    if jnp.ndim(offset) == 1:
      offset = jnp.reshape(jnp.asarray(offset), (-1, 1, 1, 1))
    return self.admits(key - query - offset)

  def block_map(self, T, S, block_q, block_k):
    if not isinstance(self.offset, numbers.Integral):
      return super().block_map(T, S, block_q, block_k)
    # A tile holds every integer distance between its smallest and largest.
    admitted = self.admits(np.arange(1 - T, S) - self.offset)
    count = np.concatenate([[0], np.cumsum(admitted)])
    first_row = np.arange(0, T, block_q)[:, None]
    last_row = np.minimum(first_row + block_q, T) - 1
    first_col = np.arange(0, S, block_k)[None, :]
    last_col = np.minimum(first_col + block_k, S) - 1
    low, high = first_col - last_row + T - 1, last_col - first_row + T
    found = count[high] - count[low]
    kinds = np.where(found == high - low, FULL, PARTIAL)
    return np.where(found == 0, EMPTY, kinds).astype(np.int8)

  def maybe(self, rows, cols):
    if isinstance(self.offset, numbers.Integral):
      return True
    span = cols[0] - rows[-1] + jnp.arange(rows.size + cols.size - 1)
    return jnp.any(self.admits(span - jnp.reshape(self.offset, (-1, 1))))

  def sees_itself(self):
    known = isinstance(self.offset, numbers.Integral)
    return known and bool(self.admits(np.asarray(-self.offset)))


@expression
class Window(Distance):
  """Admits -left <= key - (query + offset) <= right; None is unbounded."""

  left: int | None
  right: int | None
  offset: Offset = 0

  def admits(self, distance):
    admitted = distance == distance
    if self.left is not None:
      admitted &= distance >= -self.left
    if self.right is not None:
      admitted &= distance <= self.right
    return admitted


@expression
class Causal(Distance):
  """Admits key <= query + offset."""

  offset: Offset = 0

  def admits(self, distance):
    return distance <= 0


@expression
class Dilated(Distance):
  """Admits every `dilation`-th key, `left` of them before and `right` after.

  Longformer, Beltagy et al. (2020), https://arxiv.org/abs/2004.05150.
  """

  left: int
  right: int
  dilation: int

  def admits(self, distance):
    near = (distance >= -self.left * self.dilation) & (
      distance <= self.right * self.dilation
    )
    return near & (distance % self.dilation == 0)


@expression
class Strided(Distance):
  """Admits |key - query| < stride, and every stride-th key.

  Sparse Transformer, Child et al. (2019), https://arxiv.org/abs/1904.10509.
  """

  stride: int

  def admits(self, distance):
    return (abs(distance) < self.stride) | (distance % self.stride == 0)


@expression
class LogSparse(Distance):
  """Admits keys 0, 1, 2, 4, 8, ... tokens away, and those within `local`.

  Li et al. (2019), https://arxiv.org/abs/1907.00235.
  """

  local: int = 1

  def admits(self, distance):
    far = abs(distance)
    return (far & (far - 1) == 0) | (far <= self.local)
