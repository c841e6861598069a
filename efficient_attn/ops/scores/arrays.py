# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Score modifiers made of arrays: whole matrices, grids, tokens left out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from efficient_attn.ops import masks
from efficient_attn.ops.scores.base import Score, sum_to


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
class Dense(Score):
  """An array broadcastable to [B, N, T, S]."""

  array: Float[Array | np.ndarray, '...']
  axes = {'array': 'BNTS'}

  @property
  def kernel_lacks(self):
    whole = self.array.ndim > 1 and min(self.array.shape[-2:]) > 1
    if whole and not isinstance(self.array, np.ndarray):
      return 'no gradient of a whole matrix in kernels; pass a numpy array'
    return None

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
    tile = tile + sum_to(cotangent, tile.shape)
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
