# ruff: noqa: D102 (an override keeps the contract its base documents)
"""Masks that depend on the positions of query and key, known at trace time."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from efficient_attn.ops.masks.algebra import EMPTY, FULL, PARTIAL, Mask
from efficient_attn.ops.masks.arrays import Dense
from efficient_attn.ops.masks.expression import expression, quotient


class Rule(Mask):
  """Base of rules on two positions; a subclass needs `pairs`.

  The block map evaluates every pair once, a block of rows at a time. A rule of
  few keys for each query also says where they are, in `runs`.
  """

  def runs(
    self, rows: Int[np.ndarray, 'R 1'], S: int
  ) -> tuple[Int[np.ndarray, '#R M'], Int[np.ndarray, '#R M']]:
    """Where the keys of each query start and stop, in runs that are disjoint.

    Runs may stick out of [0, S), and may be empty.
    """
    raise NotImplementedError

  def block_map(self, T, S, block_q, block_k):
    return _evaluate(self, T, S, block_q, block_k)


@functools.lru_cache(maxsize=256)
def _evaluate(rule, T, S, block_q, block_k):
  starts = np.arange(0, S, block_k)
  widths = np.diff(starts, append=S)
  kinds = []
  for first in range(0, T, block_q):
    rows = np.arange(first, min(first + block_q, T))[:, None]
    found = np.add.reduceat(_seen(rule, rows, S), starts)
    whole = np.where(found == widths * len(rows), FULL, PARTIAL)
    kinds.append(np.where(found == 0, EMPTY, whole))
  kinds = np.array(kinds, np.int8)
  kinds.flags.writeable = False  # shared by all who ask again
  return kinds


def _seen(rule, rows, S):
  """How many of the queries `rows` see each of S keys."""
  if type(rule).runs is Rule.runs:
    admitted = rule.pairs(rows[None, None], np.arange(S)[None, None, None])
    return np.broadcast_to(admitted, (1, 1, len(rows), S)).sum((0, 1, 2))
  edges = [
    np.bincount(ends.clip(0, S).ravel(), minlength=S + 1)
    for ends in np.broadcast_arrays(*rule.runs(rows, S), rows)[:2]
  ]
  return np.cumsum(edges[0] - edges[1])[:S]


@expression
class Prefix(Rule):
  """Admits the first `length` keys: sinks, or the prefix of a prefix LM."""

  length: int

  def pairs(self, query, key):
    return (key < self.length) & (query == query)

  def runs(self, rows, S):
    return np.zeros((1, 1), int), np.full((1, 1), self.length)


@expression
class Leading(Rule):
  """Admits every key, to the first `length` queries alone."""

  length: int

  def pairs(self, query, key):
    return (query < self.length) & (key == key)

  def runs(self, rows, S):
    return np.zeros((1, 1), int), np.where(rows < self.length, S, 0)


@expression
class Global(Rule):
  """Admits every pair of which one is among `positions`.

  Longformer, Beltagy et al. (2020), https://arxiv.org/abs/2004.05150; the relay
  of Star-Transformer, Guo et al. (2019), https://arxiv.org/abs/1902.09113.
  """

  positions: tuple[int, ...]

  def pairs(self, query, key):
    isin = np.isin if isinstance(key, np.ndarray) else jnp.isin
    positions = np.array(self.positions, int)
    return isin(query, positions) | isin(key, positions)

  def in_tile(self, query, key):
    admitted = (query < 0) | (key < 0)
    for position in self.positions:
      admitted |= (query == position) | (key == position)
    return admitted

  def elementwise(self, T, S):
    return self if len(self.positions) <= 8 else Dense(self.dense(T, S))

  def tile(self, rows, cols):
    return self.pairs(rows[None, None, :, None], cols[None, None, None, :])

  def runs(self, rows, S):
    here = np.isin(rows, self.positions)
    keys = np.unique(self.positions)[None].astype(int)
    starts = np.concatenate([0 * here, np.where(here, 0, keys)], axis=1)
    stops = np.concatenate([S * here, np.where(here, 0, keys + 1)], axis=1)
    return starts, stops


@expression
class Fixed(Rule):
  """Admits the query's own block of `stride` and the last `summary` of others.

  Sparse Transformer, Child et al. (2019), https://arxiv.org/abs/1904.10509.
  """

  stride: int
  summary: int = 1

  def pairs(self, query, key):
    own = quotient(query, self.stride) == quotient(key, self.stride)
    return own | (key % self.stride >= self.stride - self.summary)

  def runs(self, rows, S):
    ends = np.arange(self.stride, S + self.stride, self.stride)[None]
    own = (rows // self.stride + 1) * self.stride == ends
    return ends - np.where(own, self.stride, self.summary), ends + 0 * rows


@expression
class BlockWindow(Rule):
  """Admits the query's block of `block_size`, and the ones beside it."""

  block_size: int
  left: int
  right: int

  def pairs(self, query, key):
    size = self.block_size
    distance = quotient(key, size) - quotient(query, size)
    return (distance >= -self.left) & (distance <= self.right)

  def runs(self, rows, S):
    block = rows // self.block_size
    first, last = block - self.left, block + self.right + 1
    return first * self.block_size, last * self.block_size


@expression
class Neighborhood(Rule):
  """Admits the `window` nearest positions of a grid, along every axis.

  Positions count the grid in row-major order; at a border the window moves
  inside, so that every query has as many keys. NATTEN, Hassani et al. (2023),
  https://arxiv.org/abs/2204.07143. With tile_size > 1 each cell of the grid is
  a tile of as many consecutive tokens, as in Sliding Tile Attention, Zhang et
  al. (2025), https://arxiv.org/abs/2502.04507.
  """

  grid: tuple[int, ...]
  window: tuple[int, ...]
  tile_size: int = 1

  def _axes(self, position):
    """Per axis: the place, where the window starts, its width, its step."""
    inner = math.prod(self.grid) * self.tile_size
    for size, width in zip(self.grid, self.window, strict=True):
      inner //= size
      width = min(width, size)
      place = quotient(position, inner) % size
      yield place, (place - width // 2).clip(0, size - width), width, inner

  def pairs(self, query, key):
    admitted = True
    for (_, start, width, _), (place, *_) in zip(
      self._axes(query), self._axes(key), strict=True
    ):
      admitted &= (start <= place) & (place < start + width)
    return admitted

  def runs(self, rows, S):
    # Cells along the last axis follow each other and are one run.
    *outer, (_, start, width, inner) = self._axes(rows)
    starts, length = start * inner, width * inner
    for _, start, width, inner in outer:
      cells = (start + np.arange(width)) * inner
      starts = starts[:, :, None] + cells[:, None]
      starts = starts.reshape(len(rows), -1)
    return starts, starts + length

  def dense(self, T, S):
    cells = math.prod(self.grid) * self.tile_size
    for axis, length in (('T', T), ('S', S)):
      if length > cells:
        raise ValueError(
          f'masks.Neighborhood: {axis} is {length} but the grid {self.grid} of'
          f' {self.tile_size} tokens a cell has {cells} tokens.'
        )
    return super().dense(T, S)


@expression
class Radial(Rule):
  """Admits ever fewer of the tokens of ever more distant frames.

  With a and b the places of query and key in their frames of `frame_size`
  tokens, d the distance of the frames, and 2^e the largest power of two that
  is at most max(d, 1): |a - b| < frame_size / 2^e. Where that is less than
  `min_width` = w, w of the tokens of every (w 2^e / frame_size)-th frame. And
  the whole first frame, as a sink. Radial Attention, Li et al. (2025),
  https://arxiv.org/abs/2506.19852, whose equation has w = 1 and whose code, for
  blocks, w = 128.
  """

  frame_size: int
  num_frames: int
  min_width: int = 1

  def _band(self, distance):
    """How far frames are seen, with the token itself, and which of them."""
    powers = [2**e for e in range(1, self.num_frames.bit_length())]
    decay = distance * 0 + 1
    decay += sum((distance >= power) * (power // 2) for power in powers)
    least = min(self.min_width, self.frame_size)
    width = quotient(self.frame_size, decay).clip(least)
    step = -quotient(-least * decay, self.frame_size)
    return width, distance % step == 0

  def elementwise(self, T, S):
    # A division of every pair by a number of its own takes a kernel too long.
    return Dense(self.dense(T, S))

  def pairs(self, query, key):
    size = self.frame_size
    width, seen = self._band(abs(quotient(query, size) - quotient(key, size)))
    near = abs(query % size - key % size) < width
    return near & seen | (key < size)

  def runs(self, rows, S):
    size = self.frame_size
    frames = np.arange(-(-S // size))[None]
    width, seen = self._band(abs(rows // size - frames))
    place = rows % size
    starts = np.maximum(place - width + 1, 0)
    stops = np.where(seen, np.minimum(place + width, size), starts)
    starts[:, 0], stops[:, 0] = 0, size
    return frames * size + starts, frames * size + stops
