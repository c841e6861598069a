# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Score modifiers: what is added to the scaled logits before the softmax.

The counterpart of `masks` for additive terms. An expression is evaluated one
tile at a time, so ALiBi or a forget-gate bias never exists as a [T, S] array,
and every float leaf is differentiable. Expressions add up with `+`.

    Alibi(slopes)   -slope_n |query - key|      (Press et al. 2022)
    T5(table)       table_n by the bucket of key - query  (Raffel et al. 2020)
    Diagonal(table)  table_n by key - query, up to a distance
    Swin(table, grid)  table_n by the offset in a grid    (Liu et al. 2021)
    SoftSpan(span)  log of a ramp that ends a learned span (Sukhbaatar et al.)
    Forget(gates)   sum of log f over (key, query]  (Lin et al. 2025)
    Dense(array)    array, broadcastable to [B, N, T, S]
    Except(score, tokens)  score, but nothing from or to some tokens

A new modifier is one more dataclass with `tile`, or, of the distance of query
and key, with `Relative.by_distance`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from efficient_attn.ops import masks

# Below any sum of logits, and far above the most negative float32.
HARDEST = -1e30


class Score:
  """Base of score modifiers; a subclass needs only `tile` or `in_tile`.

  Attributes:
    elementwise: whether it has an `in_tile` of elementwise operations, for
      kernels, whose learned arrays lack T and S.
  """

  elementwise = False

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
    """What is added to the logits of one tile.

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
    (gradient,) = pull(_sum_to(cotangent, tile.shape).astype(tile.dtype))

    def add(so_far, new):
      # Integer leaves (an offset) have cotangents of dtype float0.
      return so_far if new.dtype == jax.dtypes.float0 else so_far + new

    return jax.tree.map(add, total, gradient)

  def __add__(self, other: Score) -> Score:
    return Sum(self, other) if isinstance(other, Score) else NotImplemented


def _sum_to(array, shape):
  """Sums a rank-4 array over the axes where `shape` is 1."""
  axes = tuple(
    axis
    for axis, (size, wanted) in enumerate(zip(array.shape, shape, strict=True))
    if wanted == 1 and size != 1
  )
  return jnp.sum(array, axes, keepdims=True)


class Relative(Score):
  """Base of terms of the distance key - (query + offset) alone."""

  offset: masks.Offset = 0

  def by_distance(self, distance: Int[Array, '#B M']) -> Float[Array, '#B N M']:
    """The term at every distance."""
    raise NotImplementedError(f'{type(self).__name__} defines no by_distance')

  def tile(self, rows, cols):
    R, C = rows.size, cols.size
    offset = jnp.reshape(jnp.asarray(self.offset), (-1, 1))
    # Every distance of the tile once, from its last row to its first, and one
    # more. Row r of the tile is line[R - 1 - r :][:C]: copies of the line in
    # rows one shorter than it shift by one a row, without a gather.
    first = cols[0] - rows[-1] - offset
    line = self.by_distance(first + jnp.arange(R + C))
    rows = jnp.tile(line, R)[..., : R * (R + C - 1)]
    return rows.reshape(*line.shape[:2], R, R + C - 1)[..., R - 1 :]


@masks.expression
class Alibi(Score):
  """-slope_n |query + offset - key|, linear biases of Press et al. (2022).

  Train Short, Test Long: Attention with Linear Biases Enables Input Length
  Extrapolation, https://arxiv.org/abs/2108.12409.
  """

  slopes: Num[Array | np.ndarray, 'N']
  offset: masks.Offset = 0
  axes = {'slopes': 'N', 'offset': 'B'}
  elementwise = True

  def in_tile(self, query, key):
    # Distances are not exact in bfloat16 past 256.
    dtype = jnp.promote_types(self.slopes.dtype, jnp.float32)
    distance = jnp.abs(query - key + self.offset)
    return -self.slopes.astype(dtype) * distance.astype(dtype)


@masks.expression
class T5(Relative):
  """A learned bias for each bucket of distances.

  Half of the buckets hold one distance each, the rest grow with the logarithm
  up to `max_distance`; where `bidirectional`, keys after the query have half of
  all. T5, Raffel et al. (2020), https://arxiv.org/abs/1910.10683.
  """

  table: Float[Array, 'M N']
  bidirectional: bool
  max_distance: int = 128
  offset: masks.Offset = 0
  axes = {'table': 'MN', 'offset': 'B'}

  def by_distance(self, distance):
    buckets = self.table.shape[0]
    place = 0
    if self.bidirectional:
      buckets //= 2
      place = jnp.where(distance > 0, buckets, 0)
      away = jnp.abs(distance)
    else:
      away = jnp.maximum(-distance, 0)
    exact = buckets // 2
    # The first distance of every wide bucket; no logarithm is rounded.
    steps = np.arange(buckets - exact) / (buckets - exact)
    starts = exact * (self.max_distance / exact) ** steps
    starts = np.ceil(starts - 1e-9).astype(int)
    wide = exact - 1 + jnp.sum(away[..., None] >= starts, axis=-1)
    place = place + jnp.where(away < exact, away, wide)
    return jnp.moveaxis(self.table[place], -1, -2)


@masks.expression
class Diagonal(Relative):
  """A learned bias for each distance, the same at `max_distance` and beyond.

  Row max_distance + d of the table is for keys d after the query.
  """

  table: Float[Array, 'M N']
  offset: masks.Offset = 0
  axes = {'table': 'MN', 'offset': 'B'}

  def by_distance(self, distance):
    most = self.table.shape[0] // 2
    place = jnp.clip(distance, -most, most) + most
    return jnp.moveaxis(self.table[place], -1, -2)


@masks.expression
class SoftSpan(Relative):
  """log clip((ramp + span_n - distance) / ramp, 0, 1): a learned span.

  Multiplies the weights before they are normalised. Adaptive Attention Span,
  Sukhbaatar et al. (2019), https://arxiv.org/abs/1905.07799.
  """

  span: Float[Array, 'N']
  ramp: float
  offset: masks.Offset = 0
  axes = {'span': 'N', 'offset': 'B'}

  def by_distance(self, distance):
    dtype = jnp.promote_types(self.span.dtype, jnp.float32)
    left = self.span.astype(dtype)[:, None] + self.ramp
    share = (left - jnp.abs(distance).astype(dtype)[:, None]) / self.ramp
    inside = share > 0
    # Not the logarithm of 0, whose gradient is not a number.
    log = jnp.log(jnp.where(inside, jnp.minimum(share, 1), 1))
    return jnp.where(inside, log, -jnp.inf)


@masks.expression
class Swin(Score):
  """A learned bias for each offset between two places of a 2-D grid.

  Places count the grid (h, w) in row-major order; the table has a row for each
  of (2 h - 1) (2 w - 1) offsets, query minus key. Swin Transformer, Liu et al.
  (2021), https://arxiv.org/abs/2103.14030.
  """

  table: Float[Array, 'M N']
  grid: tuple[int, int]
  axes = {'table': 'MN'}

  def tile(self, rows, cols):
    height, width = self.grid
    down = rows[:, None] // width - cols // width + height - 1
    right = rows[:, None] % width - cols % width + width - 1
    bias = self.table[down * (2 * width - 1) + right]
    return jnp.moveaxis(bias, -1, 0)[None]

  def dense(self, T, S):
    height, width = self.grid
    rows = (2 * height - 1) * (2 * width - 1)
    if self.table.shape[0] != rows or max(T, S) > height * width:
      raise ValueError(
        f'scores.Swin: a grid of {height} x {width} takes T and S of at most'
        f' {height * width} and a table of {rows} rows, not T = {T}, S = {S}'
        f' and {self.table.shape[0]} rows.'
      )
    return super().dense(T, S)


@masks.expression
class Forget(Score):
  """sum_{l in (key, query + offset]} log_forget_l, a forget gate per token.

  Forgetting Transformer, Lin et al. (2025), https://arxiv.org/abs/2503.02130.
  Every sum is of gates inside its own span: the difference of two cumulative
  sums would lose all small gates behind one hard gate of -1000. A key after
  the query, which has no span, gets 0. `offset` is a scalar; S counts keys.
  """

  log_forget: Float[Array, 'B S N']
  offset: masks.Offset = 0
  axes = {'log_forget': 'BSN', 'offset': 'B'}

  def tile(self, rows, cols):
    gates = self.log_forget
    gates = gates.astype(jnp.promote_types(gates.dtype, jnp.float32))
    # A finite stand-in for -inf, of which S still have a finite sum.
    gates = jnp.maximum(gates, HARDEST).swapaxes(1, 2)
    rows = rows + self.offset
    first, last = rows[0], cols[-1]

    def cut(indices):
      return lax.dynamic_slice_in_dim(gates, indices[0], indices.size, 2)

    # Spans that end at the first row: the rest of the tile's columns, from
    # the right, and what stands between the columns and the row.
    index = jnp.arange(gates.shape[2])
    gap = jnp.where((index > last) & (index <= first), gates, 0)
    after = jnp.where(cols[1:] <= first, cut(cols)[..., 1:], 0)
    after = lax.cumsum(after, axis=2, reverse=True)
    after = jnp.pad(after, ((0, 0), (0, 0), (0, 1)))
    start = after + jnp.sum(gap, axis=2, keepdims=True)
    more = cut(rows)[..., 1:]

    def apart():
      rest = jnp.pad(lax.cumsum(more, axis=2), ((0, 0), (0, 0), (1, 0)))
      return start[:, :, None] + rest[..., None]

    def overlapping():
      steps = jnp.where(rows[1:, None] > cols, more[..., None], 0)
      steps = jnp.concatenate([start[:, :, None], steps], axis=2)
      return lax.cumsum(steps, axis=2)

    return lax.cond(last <= first, apart, overlapping)

  def dense(self, T, S):
    if self.log_forget.ndim != 3 or self.log_forget.shape[1] != S:
      raise ValueError(
        f'scores.Forget: log_forget of shape {self.log_forget.shape} must be'
        f' [B, S, N] with S = {S}, one gate per key and head.'
      )
    return super().dense(T, S)


@masks.expression
class Dense(Score):
  """An array broadcastable to [B, N, T, S]."""

  array: Float[Array | np.ndarray, '...']
  axes = {'array': 'BNTS'}

  def in_tile(self, query, key):
    return self.array

  def dense(self, T, S):
    return masks.broadcast_dense('scores.Dense', self.array, T, S)

  def accumulate(self, total, rows, cols, cotangent):
    # In place: the vjp of a slice would write a whole array for every tile.
    shape = (1,) * (4 - total.array.ndim) + total.array.shape
    array = total.array.reshape(shape)
    place = [0, 0, 0, 0]
    for axis, indices in ((2, rows), (3, cols)):
      if shape[axis] > 1:
        place[axis] = indices[0]
    tile = masks.cut_array(array, 'BNTS', rows, cols)
    tile = tile + _sum_to(cotangent, tile.shape)
    array = jax.lax.dynamic_update_slice(array, tile, place)
    return dataclasses.replace(total, array=array.reshape(total.array.shape))


@masks.expression
class Except(Score):
  """`score`, but 0 where the query or the key is among `tokens`."""

  score: Score
  tokens: Bool[Array | np.ndarray, '#B S']
  offset: masks.Offset = 0
  axes = {'tokens': 'BS', 'offset': 'B'}

  def tile(self, rows, cols):
    tokens = jnp.asarray(self.tokens)
    queries = tokens[:, rows + self.offset]
    free = queries[:, None, :, None] | tokens[:, cols][:, None, None]
    return jnp.where(free, 0, self.score.tile(rows, cols))


@masks.expression
class Sum(Score):
  """The sum of two modifiers."""

  left: Score
  right: Score

  @property
  def elementwise(self):
    return self.left.elementwise and self.right.elementwise

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


def alibi_slopes(num_heads: int) -> Float[np.ndarray, 'N']:
  """The fixed slopes of ALiBi, one per head.

  For N a power of two, slope_n = 2^(-8 (n + 1) / N). Otherwise the slopes of
  the power of two below N, then every other slope of the one above, as in the
  authors' code.
  """
  if num_heads < 1:
    raise ValueError(f'num_heads is {num_heads}; it must be at least 1.')
  below = 2 ** int(math.log2(num_heads))

  def geometric(count):
    return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

  rest = geometric(2 * below)[::2][: num_heads - below]
  return np.concatenate([geometric(below), rest]).astype(np.float32)
