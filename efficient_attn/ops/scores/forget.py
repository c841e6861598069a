# ruff: noqa: D102 (an override keeps the contract its base documents)
"""A gate for every token that forgets what came before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from efficient_attn.ops import masks
from efficient_attn.ops.scores.base import Score

# Below any sum of logits, and far above the most negative float32.
HARDEST = -1e30
# Of a gate in a kernel: below any logit that it meets there, and so large that
# sums of many have an error of less than 1e-5 in two numbers.
STEEPEST = -1e5


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
  kernel_lacks = None

  def in_kernel(self, T, S):
    high, low = sum_in_two(self.log_forget.astype(jnp.float32))
    high, low = high.swapaxes(1, 2), low.swapaxes(1, 2)

    def of_queries(x):
      return lax.dynamic_slice_in_dim(x, self.offset, T, axis=2)

    return Spans(of_queries(high), of_queries(low), high, low, self.offset)

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
class Spans(Score):
  """`Forget` by sums of all gates up to a token, each of two numbers.

  The difference of sums in one number would lose the small gates behind a hard
  one. The gradient is that of the first.
  """

  query_high: Float[Array, '#B N T']
  query_low: Float[Array, '#B N T']
  key_high: Float[Array, '#B N S']
  key_low: Float[Array, '#B N S']
  offset: masks.Offset
  axes = {
    'query_high': 'BNT',
    'query_low': 'BNT',
    'key_high': 'BNS',
    'key_low': 'BNS',
    'offset': 'B',
  }
  fixed = frozenset({'query_low', 'key_low'})
  kernel_lacks = None

  def in_tile(self, query, key):
    high = self.query_high - self.key_high
    low = self.query_low - self.key_low
    return jnp.where(key <= query + self.offset, high + low, 0)


@jax.custom_jvp
def sum_in_two(x: Float[Array, 'B S N']) -> tuple[Array, Array]:
  """Sums of all numbers of x [B, S, N] up to each, nearly as in float64.

  Numbers below `STEEPEST` count as that. The sum of both results is the sum;
  the first has its gradient.
  """
  high = jnp.maximum(x, STEEPEST)
  low = jnp.zeros_like(x)
  step = 1
  while step < x.shape[1]:
    before = [
      jnp.pad(part[:, :-step], [(0, 0), (step, 0), (0, 0)])
      for part in (high, low)
    ]
    total = high + before[0]
    # What the addition has rounded away (Knuth).
    other = total - high
    lost = (high - (total - other)) + (before[0] - other)
    lost = lost + low + before[1]
    high = total + lost
    low = lost - (high - total)
    step *= 2
  return high, low


@sum_in_two.defjvp
def _sum_in_two_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  total = jnp.cumsum(jnp.where(x > STEEPEST, dx, 0), axis=1)
  return sum_in_two(x), (total, jnp.zeros_like(total))
