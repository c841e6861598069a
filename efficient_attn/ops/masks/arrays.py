# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Masks made of arrays: ids, flags, layouts of blocks, whole matrices."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Integer

from efficient_attn.ops import chunks
from efficient_attn.ops.masks.algebra import EMPTY, FULL, PARTIAL, Mask
from efficient_attn.ops.masks.distance import Window
from efficient_attn.ops.masks.expression import expression


@expression
class Segments(Mask):
  """Admits keys whose id equals the query's; no id is special.

  Without `key_ids` the keys have those of the queries.
  """

  query_ids: Integer[Array | np.ndarray, 'B T']
  key_ids: Integer[Array | np.ndarray, 'B S'] | None = None
  axes = {'query_ids': 'BT', 'key_ids': 'BS'}

  def _ids(self, rows, cols):
    query_ids = lax.dynamic_slice_in_dim(
      self.query_ids, rows[0], rows.size, axis=1
    )
    keys = self.query_ids if self.key_ids is None else self.key_ids
    key_ids = lax.dynamic_slice_in_dim(keys, cols[0], cols.size, axis=1)
    return query_ids, key_ids

  def sees_itself(self):
    return self.key_ids is None

  def tile(self, rows, cols):
    query_ids, key_ids = self._ids(rows, cols)
    return (query_ids[:, :, None] == key_ids[:, None, :])[:, None]

  def dense(self, T, S):
    keys = self.query_ids if self.key_ids is None else self.key_ids
    lengths = {
      'query_ids': (self.query_ids.shape[1], 'T', T),
      'key_ids': (keys.shape[1], 'S', S),
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


@expression
class At(Mask):
  """`rule`, with positions in place of indices.

  Packed segments count positions from their start, and new tokens behind a
  cache from its end.
  """

  rule: Mask
  query_positions: Integer[Array | np.ndarray, '#B T']
  key_positions: Integer[Array | np.ndarray, '#B S']
  axes = {'query_positions': 'BT', 'key_positions': 'BS'}

  def tile(self, rows, cols):
    query = lax.dynamic_slice_in_dim(
      self.query_positions, rows[0], rows.size, axis=1
    )
    key = lax.dynamic_slice_in_dim(
      self.key_positions, cols[0], cols.size, axis=1
    )
    return self.rule.pairs(query[:, None, :, None], key[:, None, None, :])

  def maybe(self, rows, cols):
    return jnp.any(self.tile(rows, cols))


@expression
class Heads(Mask):
  """Admits everything for the heads of `flags`, nothing for the others.

  `Heads(f) & a | ~Heads(f) & b` is mask a for some heads and b for the rest.
  """

  flags: Bool[Array | np.ndarray, 'N']
  relative = True
  axes = {'flags': 'N'}

  def pairs(self, query, key):
    here = self.flags[None, :, None, None]
    return here & (query == query) & (key == key)

  def block_map(self, T, S, block_q, block_k):
    kinds = super().block_map(T, S, block_q, block_k)
    if isinstance(self.flags, np.ndarray) and self.flags.all():
      kinds[:] = FULL
    if isinstance(self.flags, np.ndarray) and not self.flags.any():
      kinds[:] = EMPTY
    return kinds

  def maybe(self, rows, cols):
    return jnp.any(self.flags)


@expression
class HeadWindow(Mask):
  """Admits -left_n <= key - query <= right_n for head n."""

  left: Integer[Array | np.ndarray, 'N']
  right: Integer[Array | np.ndarray, 'N']
  relative = True
  axes = {'left': 'N', 'right': 'N'}

  def pairs(self, query, key):
    distance = key - query
    left, right = self.left[:, None, None], self.right[:, None, None]
    return (distance >= -left) & (distance <= right)

  def block_map(self, T, S, block_q, block_k):
    if not (
      isinstance(self.left, np.ndarray) and isinstance(self.right, np.ndarray)
    ):
      return super().block_map(T, S, block_q, block_k)
    kinds = np.array(
      [
        Window(int(left), int(right)).block_map(T, S, block_q, block_k)
        for left, right in zip(self.left, self.right, strict=True)
      ]
    )
    return np.where((kinds == kinds[0]).all(0), kinds[0], np.int8(PARTIAL))

  def maybe(self, rows, cols):
    smallest, largest = cols[0] - rows[-1], cols[-1] - rows[0]
    return jnp.any((largest >= -self.left) & (smallest <= self.right))


@expression
class ElasticWindow(Mask):
  """Admits the last alpha_n + beta_n (query + 1) keys for head n.

  MoA, Fu et al. (2024), https://arxiv.org/abs/2406.14909: windows that grow
  with what has been read, which is a whole number, rounded down. `beta` counts
  1024ths, so that no rounding moves a border. To be joined with `Causal`.
  """

  alpha: Integer[Array | np.ndarray, 'N']
  beta: Integer[Array | np.ndarray, 'N']
  axes = {'alpha': 'N', 'beta': 'N'}

  def _first(self, query):
    """The first key of each head."""
    alpha, beta = self.alpha[:, None, None], self.beta[:, None, None]
    whole, rest = jnp.divmod(query + 1, 1024)  # so that no product overflows
    return query + 1 - alpha - beta * whole - beta * rest // 1024

  def pairs(self, query, key):
    return key >= self._first(query)

  def maybe(self, rows, cols):
    return jnp.any(cols[-1] >= self._first(rows))


@expression
class Blocks(Mask):
  """Admits `layout[..., query // block_q, key // block_k]`.

  Tiles of a numpy layout are left out at trace time, those of a traced one,
  such as the top blocks of each query, at run time.
  """

  layout: Bool[Array | np.ndarray, '*lead I J']
  block_q: int
  block_k: int
  axes = {'layout': 'BNTS'}

  def pairs(self, query, key):
    *_, B, N, I, J = (1, 1, *self.layout.shape)
    if B > 1:
      raise NotImplementedError(
        f'masks.Blocks: a layout of {B} batch elements has no rule on positions'
      )
    layout = jnp.asarray(self.layout).reshape(N, I, J)
    found = layout[:, query // self.block_q, key // self.block_k]
    return jnp.moveaxis(found[:, :, 0], 0, 1)

  def tile(self, rows, cols):
    layout = jnp.asarray(self.layout)
    layout = layout.reshape((1,) * (4 - layout.ndim) + layout.shape)
    return layout[:, :, rows // self.block_q][..., cols // self.block_k]

  def dense(self, T, S):
    found = self.layout.shape[-2:]
    wanted = -(-T // self.block_q), -(-S // self.block_k)
    if found != wanted:
      raise ValueError(
        f'masks.Blocks: layout of shape {self.layout.shape} must end in'
        f' {wanted}, the blocks of {self.block_q} x {self.block_k} in T = {T}'
        f' and S = {S}.'
      )
    return super().dense(T, S)

  def block_map(self, T, S, block_q, block_k):
    if not isinstance(self.layout, np.ndarray):
      return super().block_map(T, S, block_q, block_k)
    layout = self.layout.reshape(-1, *self.layout.shape[-2:])

    def count(flags, size, length, block):
      """Sums flags [I, ...] of blocks of `size` over tiles of `block`."""
      edges = np.append(np.arange(0, length, block), length)
      whole, part = np.divmod(edges, size)
      flags = np.pad(flags.astype(int), ((0, 1), (0, 0)))
      before = np.pad(np.cumsum(flags, axis=0), ((1, 0), (0, 0)))
      return np.diff(
        size * before[whole] + part[:, None] * flags[whole], axis=0
      )

    def counts(flags):
      by_row = count(flags, self.block_q, T, block_q)
      return count(by_row.T, self.block_k, S, block_k).T

    some, lacking = counts(layout.any(0)), counts(~layout.all(0))
    kinds = np.where(lacking == 0, FULL, PARTIAL)
    return np.where(some == 0, EMPTY, kinds).astype(np.int8)

  def maybe(self, rows, cols):
    if isinstance(self.layout, np.ndarray):
      return True
    return jnp.any(self.tile(rows, cols))


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
  axes = {'array': 'BNTS'}

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


def packed(mask: Mask | None, segment_ids: Int[Array, 'B T']) -> Mask:
  """`mask` inside every segment, with positions counted from its start.

  A segment ends where the id changes: equal ids that meet again are different
  segments, as recurrences have it.
  """
  runs = chunks.segment_counts(segment_ids)
  same = Segments(runs)
  if mask is None:
    return same
  if mask.relative:
    return mask & same
  positions = chunks.segment_positions(segment_ids)
  return At(mask, positions, positions) & same
