"""Masks and biases in a kernel: functions of positions and of arrays.

An expression comes as a function of the positions of queries and keys and of
its arrays, all broadcastable to one tile, so that it knows neither how a tile
is laid out nor where its arrays are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.attention.tiles import Schedule

LANES = 128


@dataclasses.dataclass(frozen=True)
class Term:
  """A mask or a bias; hashable.

  Attributes:
    function: maps query and key positions and a list of arrays to a tile.
    axes: of each array, in the order BNTS; those that an array lacks are
      broadcast.
    learned: which arrays have a gradient; none of them has T and S.
  """

  function: Callable[..., jax.Array]
  axes: tuple[str, ...]
  learned: tuple[int, ...] = ()


def lay_out(
  x: jax.Array, axes: str, schedule: Schedule, place: Callable
) -> tuple[jax.Array, pl.BlockSpec]:
  """An array as a kernel takes it, with its block specification.

  Args:
    x: the array.
    axes: its axes.
    schedule: of the call.
    place: maps the indices of a program to (b, n, i, p): batch, head, block
      of queries, span of keys.
  """
  R, C, span = schedule.rows, schedule.cols, schedule.span
  full = dict(zip('TS', schedule.padded, strict=True))
  pad = [(0, full.get(a, n) - n) for a, n in zip(axes, x.shape, strict=True)]
  sizes = dict(zip(axes, x.shape, strict=True))
  lead = sizes.get('B', 1), sizes.get('N', 1)
  if x.dtype == bool:
    x = x.astype(jnp.int8 if axes[-2:] == 'TS' else jnp.int32)
  if 'T' not in axes and 'S' not in axes:
    return x.reshape(lead), pl.BlockSpec(memory_space=pltpu.SMEM)
  x = jnp.pad(x, pad)

  def spec(block, *rest):
    def index(*ids):
      b, n, i, p = place(*ids)
      at = dict(i=i, p=p)
      head = (b if 'B' in axes else 0), (n if 'N' in axes else 0)
      return *head, *(at.get(r, 0) for r in rest)

    return pl.BlockSpec((1, 1, *block), index)

  if 'S' not in axes:
    return x.reshape(*lead, -1, 1, R), spec((1, 1, R), 'i', '', '')
  if 'T' not in axes:
    return x.reshape(*lead, -1, 1, C), spec((span, 1, C), 'p', '', '')
  return x.reshape(*lead, *x.shape[-2:]), spec((R, span * C), 'i', 'p')


class Reader:
  """Evaluates a term on pieces of tiles.

  Args:
    term: the term.
    refs: of its arrays, as `lay_out` gave them.
    place: (b, n, i, p).
    schedule: of the call.
    turned: whether keys run along the first axis of a tile.
  """

  def __init__(
    self,
    term: Term,
    refs: Sequence[Any],
    place: tuple,
    schedule: Schedule,
    *,
    turned: bool,
  ):
    self.term, self.refs, self.place = term, refs, place
    self.schedule, self.turned = schedule, turned
    # The same for all tiles of a block: made before the loop over them, in all
    # lanes.
    self._columns = {
      which: jnp.broadcast_to(ref[0, 0, 0], (LANES, schedule.rows)).T
      for which, (ref, axes) in enumerate(zip(refs, term.axes, strict=True))
      if 'T' in axes and 'S' not in axes and not turned
    }

  def positions(
    self, tile: jax.Array, rows: slice, cols: slice
  ) -> tuple[jax.Array, jax.Array]:
    """Positions of queries [R, 1] and keys [1, C], or [1, R] and [C, 1]."""
    _, _, i, p = self.place
    s = self.schedule
    query = i * s.rows + rows.start
    key = (p * s.span + tile) * s.cols + cols.start
    return (
      query + _indices(rows, 1 if self.turned else 0),
      key + _indices(cols, 0 if self.turned else 1),
    )

  def arrays(
    self, tile: jax.Array, rows: slice, cols: slice
  ) -> list[jax.Array]:
    """The arrays, cut to a piece of a tile."""
    return [
      self._cut(which, tile, rows, cols) for which in range(len(self.refs))
    ]

  def _cut(self, which, tile, rows, cols):
    ref, axes = self.refs[which], self.term.axes[which]
    if 'S' in axes and 'T' in axes:
      start = pl.multiple_of(tile * self.schedule.cols + cols.start, LANES)
      found = ref[0, 0, rows, pl.ds(start, cols.stop - cols.start)]
      if found.dtype.itemsize < 4:
        whole = jnp.issubdtype(found.dtype, jnp.integer)
        found = found.astype(jnp.int32 if whole else jnp.float32)
      return found.T if self.turned else found
    if 'T' in axes:
      if self.turned:
        return ref[0, 0, 0, :, rows]
      return jnp.tile(
        self._columns[which][rows], (1, (cols.stop - cols.start) // LANES)
      )
    if 'S' in axes:
      found = ref[0, 0, tile, :, cols]
      return column(found) if self.turned else found
    b, n, *_ = self.place
    return ref[b if 'B' in axes else 0, n if 'N' in axes else 0]

  def __call__(self, tile: jax.Array, rows: slice, cols: slice) -> jax.Array:
    """The term on a piece of a tile."""
    return self.term.function(
      *self.positions(tile, rows, cols), self.arrays(tile, rows, cols)
    )


def _indices(part, axis):
  shape = [1, 1]
  shape[axis] = part.stop - part.start
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def column(row: jax.Array) -> jax.Array:
  """[1, X] to [X, 1]."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def row(column: jax.Array) -> jax.Array:
  """[X, 1] to [1, X]."""
  return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
