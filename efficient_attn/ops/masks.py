# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Mask expressions: which keys a query may attend to.

A mask is an expression, not an array. One expression serves the dense
reference (`dense`), the blockwise loop and the kernels (`tile`, `block_map`,
`maybe`), so a tile that admits nothing is never visited.

    causal = masks.Causal()
    packed = masks.Causal() & masks.Segments(ids, ids)
    local = masks.Window(128, 0) | masks.Dense(is_global)

With `q` a query and `k` a key index, both counted from 0 whatever T and S:

    Causal(offset)               k <= q + offset
    Window(left, right, offset)  -left <= k - (q + offset) <= right
    Segments(query_ids, key_ids) query_ids[q] == key_ids[k]
    Dense(array)                 array[..., q, k]

and `&`, `|`, `~` combine them. An offset that is a Python int is static: the
block map sees through it. An int array, scalar or [B], is traced (decoding
with a cache) and its empty tiles are skipped at run time instead.

A new mask is one more dataclass with `tile`, and with `block_map` or `maybe`
where it can say more than "this tile may hold anything".
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int8, Integer

EMPTY, PARTIAL, FULL = 0, 1, 2

Offset = int | Integer[Array, ''] | Integer[Array, 'B']


@dataclass_transform(frozen_default=True)
def expression(cls):
  """Makes `cls` a frozen dataclass and a pytree.

  A field that holds a Python number or None is static: part of the tree's
  structure, and so known at trace time. Any other field is a child.
  """
  cls = dataclasses.dataclass(frozen=True)(cls)
  names = tuple(field.name for field in dataclasses.fields(cls))

  def flatten(node):
    # A node that a transformation rebuilt keeps its form, whatever its leaves.
    static = node.__dict__.get('_static')
    if static is None:
      static = tuple(
        (name, getattr(node, name))
        for name in names
        if isinstance(getattr(node, name), (numbers.Number, type(None)))
      )
    known = dict(static)
    children = [
      (jax.tree_util.GetAttrKey(name), getattr(node, name))
      for name in names
      if name not in known
    ]
    return children, static

  def unflatten(static, children):
    # Not through __init__: transformations put placeholders in the leaves.
    node = object.__new__(cls)
    known = dict(static)
    children = iter(children)
    for name in names:
      value = known[name] if name in known else next(children)
      object.__setattr__(node, name, value)
    object.__setattr__(node, '_static', static)
    return node

  jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
  return cls


class Mask:
  """Base of mask expressions; a subclass needs only `tile`."""

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
    raise NotImplementedError(f'{type(self).__name__} does not define tile')

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

  def __and__(self, other: Mask) -> Mask:
    return And(self, other) if isinstance(other, Mask) else NotImplemented

  def __or__(self, other: Mask) -> Mask:
    return Or(self, other) if isinstance(other, Mask) else NotImplemented

  def __invert__(self) -> Mask:
    return Not(self)


def _from_offset(rows, cols, offset):
  """Key minus shifted query, [1, 1, R, C] or [B, 1, R, C]."""
  difference = (cols[None, :] - rows[:, None])[None, None]
  return difference - jnp.reshape(jnp.asarray(offset), (-1, 1, 1, 1))


def _band_map(low, high, T, S, block_q, block_k):
  """Exact block map of `low <= key - query <= high`; None is unbounded."""
  first_row = np.arange(0, T, block_q)[:, None]
  last_row = np.minimum(first_row + block_q, T) - 1
  first_col = np.arange(0, S, block_k)[None, :]
  last_col = np.minimum(first_col + block_k, S) - 1
  # A tile holds every integer difference between these two.
  smallest, largest = first_col - last_row, last_col - first_row
  empty = np.zeros(smallest.shape, bool)
  full = np.ones(smallest.shape, bool)
  if low is not None:
    empty |= largest < low
    full &= smallest >= low
  if high is not None:
    empty |= smallest > high
    full &= largest <= high
  if low is not None and high is not None and low > high:
    empty[:] = True
  kinds = np.where(empty, EMPTY, np.where(full, FULL, PARTIAL))
  return kinds.astype(np.int8)


@expression
class Window(Mask):
  """Admits -left <= key - (query + offset) <= right; None is unbounded."""

  left: int | None
  right: int | None
  offset: Offset = 0

  def tile(self, rows, cols):
    difference = _from_offset(rows, cols, self.offset)
    admitted = jnp.ones(difference.shape, bool)
    if self.left is not None:
      admitted &= difference >= -self.left
    if self.right is not None:
      admitted &= difference <= self.right
    return admitted

  def block_map(self, T, S, block_q, block_k):
    if not isinstance(self.offset, numbers.Integral):
      return super().block_map(T, S, block_q, block_k)
    low = None if self.left is None else self.offset - self.left
    high = None if self.right is None else self.offset + self.right
    return _band_map(low, high, T, S, block_q, block_k)

  def maybe(self, rows, cols):
    if isinstance(self.offset, numbers.Integral):
      return True
    smallest = cols[0] - rows[-1] - self.offset
    largest = cols[-1] - rows[0] - self.offset
    admits = jnp.ones(jnp.shape(self.offset), bool)
    if self.left is not None:
      admits &= largest >= -self.left
    if self.right is not None:
      admits &= smallest <= self.right
    return jnp.any(admits)


@expression
class Causal(Mask):
  """Admits key <= query + offset."""

  offset: Offset = 0

  def tile(self, rows, cols):
    return Window(None, 0, self.offset).tile(rows, cols)

  def block_map(self, T, S, block_q, block_k):
    return Window(None, 0, self.offset).block_map(T, S, block_q, block_k)

  def maybe(self, rows, cols):
    return Window(None, 0, self.offset).maybe(rows, cols)


@expression
class Segments(Mask):
  """Admits keys whose id equals the query's; no id is special."""

  query_ids: Integer[Array | np.ndarray, 'B T']
  key_ids: Integer[Array | np.ndarray, 'B S']

  def _ids(self, rows, cols):
    query_ids = lax.dynamic_slice_in_dim(
      self.query_ids, rows[0], rows.size, axis=1
    )
    key_ids = lax.dynamic_slice_in_dim(self.key_ids, cols[0], cols.size, axis=1)
    return query_ids, key_ids

  def tile(self, rows, cols):
    query_ids, key_ids = self._ids(rows, cols)
    return (query_ids[:, :, None] == key_ids[:, None, :])[:, None]

  def dense(self, T, S):
    lengths = {
      'query_ids': (self.query_ids.shape[1], 'T', T),
      'key_ids': (self.key_ids.shape[1], 'S', S),
    }
    for name, (found, axis, expected) in lengths.items():
      if found != expected:
        raise ValueError(
          f'Segments: {name} has length {found} but {axis} is {expected};'
          f' pass one id per position, [B, {axis}].'
        )
    return super().dense(T, S)

  def maybe(self, rows, cols):
    query_ids, key_ids = self._ids(rows, cols)
    below = query_ids.min(axis=1) <= key_ids.max(axis=1)
    above = query_ids.max(axis=1) >= key_ids.min(axis=1)
    return jnp.any(below & above)


def cut(array: Array | np.ndarray, rows: Array, cols: Array) -> Array:
  """The tile of an array broadcastable to [B, N, T, S], as rank 4."""
  array = jnp.asarray(array).reshape((1,) * (4 - array.ndim) + array.shape)
  for axis, indices in ((2, rows), (3, cols)):
    if array.shape[axis] > 1:
      array = lax.dynamic_slice_in_dim(array, indices[0], indices.size, axis)
  return array


@expression
class Dense(Mask):
  """Admits where `array`, broadcastable to [B, N, T, S], is True."""

  array: Bool[Array | np.ndarray, '...']

  def tile(self, rows, cols):
    tile = cut(self.array, rows, cols)
    return jnp.broadcast_to(tile, tile.shape[:2] + (rows.size, cols.size))

  def dense(self, T, S):
    return broadcast_dense('masks.Dense', self.array, T, S)


def broadcast_dense(name: str, array, T: int, S: int) -> Array:
  """`array` broadcast to [#B, #N, T, S], or an error that names the axis."""
  if array.ndim > 4:
    raise ValueError(
      f'{name}: array of shape {array.shape} has {array.ndim} axes; it must'
      ' be broadcastable to [B, N, T, S].'
    )
  shape = (1,) * (4 - array.ndim) + array.shape
  for axis, found, expected in (('T', shape[2], T), ('S', shape[3], S)):
    if found not in (1, expected):
      raise ValueError(
        f'{name}: axis {axis} of the array of shape {array.shape} is {found}'
        f' but {axis} is {expected}; it must be 1 or {expected}.'
      )
  return jnp.broadcast_to(jnp.asarray(array).reshape(shape), shape[:2] + (T, S))


@expression
class And(Mask):
  """Admits what both admit."""

  left: Mask
  right: Mask

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


@expression
class Or(Mask):
  """Admits what either admits."""

  left: Mask
  right: Mask

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


@expression
class Not(Mask):
  """Admits what `mask` does not."""

  mask: Mask

  def tile(self, rows, cols):
    return ~self.mask.tile(rows, cols)

  def dense(self, T, S):
    return ~self.mask.dense(T, S)

  def block_map(self, T, S, block_q, block_k):
    return np.int8(FULL) - self.mask.block_map(T, S, block_q, block_k)
