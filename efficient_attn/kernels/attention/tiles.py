"""Tiles of the matrix of logits, and which of them a program visits.

A program holds one block of R queries, and loops over the tiles of C keys that
admit anything. The tiles of a block are sorted by kind, and each kind has a
loop of its own:

    FULL     no mask
    LOWER    nothing in the upper right quarter, as on a causal diagonal
    UPPER    nothing in the lower left quarter, as where a window begins
    PARTIAL  anything else

Keys and values of a head stay in the VMEM while they fit; longer ones are cut
into spans, of which the last grid axis takes one after another.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int8

FULL, LOWER, UPPER, PARTIAL = range(4)
# Of block maps.
EMPTY_BLOCK, FULL_BLOCK = 0, 2


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The tiles of a call; hashable.

  Attributes:
    length: T.
    keys: S.
    rows: R, queries of a block.
    cols: C, keys of a tile.
    span: tiles of keys that are in the VMEM at once.
    starts: int32 [spans, blocks, kinds + 1], where the tiles of a kind start.
    tiles: int32 [tiles], the tile of keys, in its span.
    blocks: int32 [tiles], the block of queries.
    present: the kinds that there are.
  """

  length: int
  keys: int
  rows: int
  cols: int
  span: int
  starts: bytes
  tiles: bytes
  blocks: bytes
  present: tuple[int, ...]

  @property
  def num_blocks(self) -> int:
    """Blocks of queries."""
    return -(-self.length // self.rows)

  @property
  def num_spans(self) -> int:
    """Spans of keys."""
    return -(-self.keys // (self.cols * self.span))

  @property
  def padded(self) -> tuple[int, int]:
    """T and S, filled up to whole blocks and spans."""
    return (
      self.num_blocks * self.rows,
      self.num_spans * self.span * self.cols,
    )

  def array(self, name: str) -> np.ndarray:
    """`starts`, `tiles` or `blocks`."""
    return np.frombuffer(getattr(self, name), np.int32)

  def pieces(self, kind: int) -> tuple[tuple[slice, slice], ...]:
    """The (rows, columns) of both halves of a tile that may admit anything.

    Two chains of products interleave.
    """
    r, c = self.rows, self.cols
    upper, lower = slice(0, r // 2), slice(r // 2, r)
    left = slice(0, c // 2 if kind == LOWER else c)
    right = slice(c // 2 if kind == UPPER else 0, c)
    return (upper, left), (lower, right)


def make_schedule(
  block_map: Callable[[int, int], Int8[np.ndarray, 'I J']],
  length: int,
  keys: int,
  rows: int,
  cols: int,
  span: int,
) -> Schedule:
  """Lists the tiles that a mask admits anything of.

  Args:
    block_map: maps the sizes of a block to the kinds of all blocks.
    length: T.
    keys: S.
    rows: R, even.
    cols: C, even.
    span: most tiles of keys in the VMEM.
  """
  I, J = -(-length // rows), -(-keys // cols)
  spans = -(-J // span)
  span = -(-J // spans)
  quarters = np.zeros((2 * I, 2 * J), np.int8)
  found = block_map(rows // 2, cols // 2)
  quarters[: found.shape[0], : found.shape[1]] = found
  if keys % cols:
    # What stands behind the last key is masked.
    ragged = quarters[:, keys // (cols // 2) :]
    ragged[ragged == FULL_BLOCK] = 1
  quarters = quarters.reshape(I, 2, J, 2).swapaxes(1, 2)
  kinds = np.full((I, J), PARTIAL)
  kinds[quarters[:, :, 1, 0] == EMPTY_BLOCK] = UPPER
  kinds[quarters[:, :, 0, 1] == EMPTY_BLOCK] = LOWER
  # Rows behind the last query may be anything.
  rest = np.arange(2 * I).reshape(I, 1, 2, 1) * (rows // 2) >= length
  kinds[((quarters == FULL_BLOCK) | rest).all((2, 3))] = FULL
  i, j = np.nonzero((quarters != EMPTY_BLOCK).any((2, 3)))
  kind, p = kinds[i, j], j // span
  order = np.lexsort((j, kind, i, p))
  i, j, kind, p = i[order], j[order], kind[order], p[order]
  place = (p * I + i) * 4 + kind
  starts = np.searchsorted(place, np.arange(spans * I * 4 + 1))
  starts = np.concatenate(
    [starts[:-1].reshape(-1, 4), starts[4::4, None]], axis=1
  )
  return Schedule(
    length=length,
    keys=keys,
    rows=rows,
    cols=cols,
    span=span,
    starts=starts.astype(np.int32).tobytes(),
    tiles=(j % span).astype(np.int32).tobytes(),
    blocks=i.astype(np.int32).tobytes(),
    present=tuple(np.unique(kind).tolist()),
  )
