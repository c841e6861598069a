# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Score modifiers that depend on the distance of query and key alone."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from efficient_attn.ops import masks
from efficient_attn.ops.scores.base import Score


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
  kernel_lacks = None

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
