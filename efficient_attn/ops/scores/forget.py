# ruff: noqa: D102 (an override keeps the contract its base documents)
"""A gate for every token that forgets what came before."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from efficient_attn.ops import masks
from efficient_attn.ops.scores.base import Score

# Below any sum of logits, and far above the most negative float32.
HARDEST = -1e30


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
