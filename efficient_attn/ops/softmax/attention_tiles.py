"""Tiles of the matrix of logits: which are visited, and where they lie."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32

from efficient_attn.ops import masks


class Costs(NamedTuple):
  """The sizes of tiles there are, and what a tile costs."""

  blocks: tuple[tuple[int, int], ...]  # to choose from, the largest first
  shared: int  # logits per head from which on a matmul uses every core
  alone: float  # how much dearer an element is in a smaller one
  tile: int  # what a tile costs beside its elements, in elements


# Eight heads of float32 logits are 4 MiB in the largest tile, whose columns may
# begin at any half; smaller ones waste less on what a mask does not admit.
MACHINE = Costs(((256, 512), (256, 256), (128, 128)), 2**17, 1.7, 12_288)
# One virtual device a core, as the trainer divides a CPU: no matmul is shared.
CORE = Costs(((256, 256), (128, 128)), 0, 1, 2048)


class KernelTiles(NamedTuple):
  """Tiles of the kernels on one kind of device.

  Attributes:
    rows: most queries of a block.
    cols: most keys of a tile.
    keys: bytes of the VMEM for keys, values and their gradients.
    vmem: bytes of the VMEM that a kernel may use.
  """

  rows: int
  cols: int
  keys: int
  vmem: int


# By kind of device and dtype. A float32 product is made of six in bfloat16, and
# unrolled into as many instructions.
MIB = 2**20
KERNEL_TILES = {
  ('TPU v4', 'bfloat16'): KernelTiles(512, 512, 6 * MIB, 16 * MIB),
  ('TPU v4', 'float32'): KernelTiles(256, 256, 6 * MIB, 16 * MIB),
  ('TPU v5 lite', 'bfloat16'): KernelTiles(512, 512, 96 * MIB, 120 * MIB),
  ('TPU v5 lite', 'float32'): KernelTiles(256, 256, 96 * MIB, 120 * MIB),
  ('TPU v6 lite', 'bfloat16'): KernelTiles(512, 512, 96 * MIB, 120 * MIB),
  ('TPU v6 lite', 'float32'): KernelTiles(256, 256, 96 * MIB, 120 * MIB),
  # v5p, v7x, and where no mesh names the device.
  (None, 'bfloat16'): KernelTiles(512, 512, 40 * MIB, 60 * MIB),
  (None, 'float32'): KernelTiles(256, 256, 40 * MIB, 60 * MIB),
}


def kernel_tiles(device: str | None, dtype: np.dtype) -> KernelTiles:
  """The tiles of the kernels on a kind of device."""
  name = jnp.dtype(dtype).name
  return KERNEL_TILES.get((device, name), KERNEL_TILES[None, name])


def device_here() -> str | None:
  """The kind of device that the mesh in context names."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return None if device is None else device.device_kind


class Tiling(NamedTuple):
  """Which tiles of which size are visited: see `tile_schedule`."""

  block_q: int
  block_k: int
  tiles: Int32[np.ndarray, 'tiles 3']

  @property
  def elements(self) -> int:
    """How many logits per head are computed."""
    return len(self.tiles) * self.block_q * self.block_k


def fit_block(length: int, block: int) -> int:
  """The size of the fewest equal blocks of at most `block` that cover."""
  return -(-length // -(-length // block))


def choose_tiles(
  mask: masks.Mask | None,
  T: int,
  S: int,
  block_q: int | None = None,
  block_k: int | None = None,
) -> Tiling:
  """Covers what a mask admits with the tiles that cost least.

  A mask that admits a third of the smallest tiles or more gets the largest.
  `block_q` and `block_k` set the size instead.
  """
  costs = costs_here()

  def tiling(rows, cols, halves=False):
    rows, cols = fit_block(T, block_q or rows), fit_block(S, block_k or cols)
    halves = halves and not block_k and cols < S
    cols += cols % 2 * halves
    tiles = tile_schedule(mask, T, S, rows, cols, halves=halves)
    return Tiling(rows, cols, tiles)

  def cost(tiling):
    elements = tiling.block_q * tiling.block_k
    each = elements * (1 if elements >= costs.shared else costs.alone)
    return len(tiling.tiles) * (each + costs.tile)

  largest, *between, smallest = costs.blocks
  if mask is None or (block_q and block_k):
    return tiling(*largest)
  largest = tiling(*largest, halves=True)
  smallest = tiling(*smallest)
  if 3 * smallest.elements >= T * S:
    return largest
  return min(
    [largest, *(tiling(*blocks) for blocks in between), smallest], key=cost
  )


def costs_here() -> Costs:
  """The costs on the devices of the mesh in context, a CPU's or others."""
  mesh = jax.sharding.get_abstract_mesh()
  device = mesh.abstract_device
  divided = device is not None and device.platform == 'cpu' and mesh.size > 1
  return CORE if divided else MACHINE


def tile_schedule(
  mask: masks.Mask | None,
  T: int,
  S: int,
  block_q: int,
  block_k: int,
  *,
  halves: bool = False,
) -> Int32[np.ndarray, 'tiles 3']:
  """The tiles that are visited, row by row.

  Args:
    mask: what is to be covered; None admits all.
    T: number of rows.
    S: number of columns.
    block_q: rows of a tile.
    block_k: columns of a tile, even with `halves`.
    halves: whether a tile may begin at any half of `block_k`.

  Returns:
    One row per tile: the block row i, the first column, and the kind (PARTIAL
    or FULL).
  """
  width = block_k // 2 if halves else block_k
  if mask is None:
    kinds = np.full((-(-T // block_q), -(-S // width)), masks.FULL, np.int8)
  else:
    kinds = mask.block_map(T, S, block_q, width)
  i, j = np.nonzero(kinds != masks.EMPTY)
  kinds = kinds[i, j]
  if halves:
    i, j, kinds = _paired(i, j, kinds)
  return np.stack([i, j * width, kinds], axis=1).astype(np.int32)


def by_keys(tiles: Int32[np.ndarray, 'tiles 3']) -> np.ndarray:
  """The tiles of a schedule column by column (FlashAttention's order)."""
  return tiles[np.lexsort((tiles[:, 0], tiles[:, 1]))]


def _paired(i, j, kinds):
  """Joins every two neighbours in a row; the last of an odd run stays alone."""
  follows = (np.diff(i, prepend=-1) == 0) & (np.diff(j, prepend=-2) == 1)
  index = np.arange(len(i))
  start = np.maximum.accumulate(np.where(follows, 0, index))
  begins = (index - start) % 2 == 0
  paired = np.append(follows & ~begins, False)[1:]  # by the one behind it
  full = (
    (kinds == masks.FULL) & paired & (np.append(kinds, 0)[1:] == masks.FULL)
  )
  kinds = np.where(full, masks.FULL, masks.PARTIAL)
  return i[begins], j[begins], kinds[begins]


class Tile(NamedTuple):
  """Where a tile lies, and which of its elements count.

  A last block that would stick out is moved back inside the array, so that no
  expression sees an index out of range. What it then shares with the block
  before it belongs to that block; `own` is None when nothing is shared.
  """

  row_start: Int[Array, '']
  col_start: Int[Array, '']
  rows: Int[Array, 'R']
  cols: Int[Array, 'C']
  own_rows: Bool[Array, 'R']
  own: Bool[Array, '1 1 R C'] | None


def locate(
  R: int, C: int, i: Array, first: Array, T: int, S: int, shared: bool
) -> Tile:
  """The tile of R x C in block row i whose columns begin at `first`.

  `shared` says whether any tile of the schedule sticks out of T x S.
  """
  row_start, col_start = jnp.minimum(i * R, T - R), jnp.minimum(first, S - C)
  rows, cols = row_start + jnp.arange(R), col_start + jnp.arange(C)
  own_rows, own_cols = rows >= i * R, cols >= first
  own = (own_rows[:, None] & own_cols)[None, None]
  return Tile(
    row_start, col_start, rows, cols, own_rows, own if shared else None
  )


def take_rows(x: Array, tile: Tile) -> Array:
  """[B, K, G, T, ...] -> [B, K, G * R, ...]: a group shares one matmul."""
  x = lax.dynamic_slice_in_dim(x, tile.row_start, tile.rows.size, axis=3)
  return x.reshape(x.shape[:2] + (-1,) + x.shape[4:])


def take_cols(x: Array, tile: Tile) -> Array:
  """[B, K, S, ...] -> [B, K, C, ...]."""
  return lax.dynamic_slice_in_dim(x, tile.col_start, tile.cols.size, axis=2)


def put_rows(total: Array, new: Array, tile: Tile, shared: bool) -> Array:
  """Writes [B, K, G, R, ...] rows; of `shared` blocks only their own."""
  if shared:
    old = lax.dynamic_slice_in_dim(total, tile.row_start, tile.rows.size, 3)
    own = tile.own_rows.reshape((-1,) + (1,) * (new.ndim - 4))
    new = jnp.where(own, new, old)
  return lax.dynamic_update_slice_in_dim(total, new, tile.row_start, axis=3)


def add_at(total: Array, update: Array, start: Array, axis: int) -> Array:
  """Adds to a slice, in place under XLA."""
  old = lax.dynamic_slice_in_dim(total, start, update.shape[axis], axis)
  return lax.dynamic_update_slice_in_dim(total, old + update, start, axis)
