# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Masks made of arrays: ids, flags, layouts of blocks, whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from efficient_attn.ops import chunks
from efficient_attn.ops.masks.algebra import EMPTY, FULL, PARTIAL, Mask
from efficient_attn.ops.masks.distance import Window
from efficient_attn.ops.masks.expression import (
  cut,
  cut_array,
  expression,
  quotient,
  with_axes,
)


@expression
class Segments(Mask):
  """Admits keys whose id equals the query's; no id is special.

  Without `key_ids` the keys have those of the queries.
  """

  query_ids: Integer[Array | np.ndarray, 'B T']
  key_ids: Integer[Array | np.ndarray, 'B S'] | None = None
  axes = {'query_ids': 'BT', 'key_ids': 'BS'}

  def elementwise(self, T, S):
    keys = self.query_ids if self.key_ids is None else self.key_ids
    return Segments(self.query_ids, keys)

  def sees_itself(self):
    return self.key_ids is None

  def in_tile(self, query, key):
    return self.query_ids == self.key_ids

  def tile(self, rows, cols):
    return super(Segments, self.elementwise(0, 0)).tile(rows, cols)

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
    own = cut(self.elementwise(0, 0), rows, cols)
    query_ids, key_ids = own.query_ids, own.key_ids
    below = query_ids.min(axis=2) <= key_ids.max(axis=3)
    above = query_ids.max(axis=2) >= key_ids.min(axis=3)
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

  def in_tile(self, query, key):
    return self.rule.pairs(self.query_positions, self.key_positions)

  def tile(self, rows, cols):
    # The arrays of a rule, such as a layout of blocks, are not cut.
    query = cut_array(self.query_positions, 'BT', rows, cols)
    key = cut_array(self.key_positions, 'BS', rows, cols)
    return self.rule.pairs(query, key)

  def elementwise(self, T, S):
    rule = self.rule.elementwise(T, S)
    axes = jax.tree.leaves(with_axes(lambda _, axes: axes, rule))
    if set('TS') & set(''.join(axes)):
      return Dense(self.dense(T, S))
    return At(rule, self.query_positions, self.key_positions)

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
    return _per_head(self.flags) & (query == query) & (key == key)

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
    left, right = _per_head(self.left), _per_head(self.right)
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
    alpha, beta = _per_head(self.alpha), _per_head(self.beta)
    read = query + 1
    # In two parts, so that no product overflows.
    whole, rest = quotient(read, 1024), quotient(beta * (read % 1024), 1024)
    return read - alpha - beta * whole - rest

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

  def elementwise(self, T, S):
    return Dense(self.dense(T, S))

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


def _per_head(x):
  """[N] to [N, 1, 1]; what is cut to a tile stays as it is."""
  return x[:, None, None] if jnp.ndim(x) == 1 else x


@expression
class Dense(Mask):
  """Admits where `array`, broadcastable to [B, N, T, S], is True."""

  array: Bool[Array | np.ndarray, '...']
  axes = {'array': 'BNTS'}

  def in_tile(self, query, key):
    return self.array

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
