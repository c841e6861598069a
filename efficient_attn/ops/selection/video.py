"""Selectors of video: bidirectional maps over a grid of frames.

Tokens count a grid (F, H, W) in row-major order, frame by frame.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from efficient_attn.ops import masks
from efficient_attn.ops.selection import scoring
from efficient_attn.ops.selection.expressions import Groups
from efficient_attn.ops.selection.kmeans import kmeans
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.ops.softmax.normalizers import softmax

Query = Float[Array, 'B T N H']
Key = Float[Array, 'B T K H']
Grid = tuple[int, int, int]


def _check(grid: Grid, query: Array, key: Array) -> None:
  lengths = query.shape[1], key.shape[1]
  if lengths != (math.prod(grid),) * 2:
    raise ValueError(
      f'grid {grid} has {math.prod(grid)} tokens but query and key {lengths};'
      ' they must be equal.'
    )


def tile_ids(grid: Grid, tile: Grid) -> Int[np.ndarray, 'T']:
  """The tile of each token, tiles counted in row-major order."""
  ids = np.zeros(grid, int)
  for axis, (size, width) in enumerate(zip(grid, tile, strict=True)):
    count = scoring.divide(size, width)
    index = np.arange(size) // width
    ids = ids * count + index.reshape(
      [-1 if a == axis else 1 for a in range(3)]
    )
  return ids.reshape(-1)


def _groups(layout, query_ids, key_ids=None) -> Groups:
  ids = [query_ids, query_ids if key_ids is None else key_ids]
  return Groups(
    layout, *(x.reshape((1,) * (3 - x.ndim) + x.shape) for x in ids)
  )


def _pool(x: Array, ids: np.ndarray) -> Array:
  """The mean of the tokens of each tile; all tiles are of one size."""
  order = np.argsort(ids, kind='stable')
  return scoring.pool(x[:, order], len(ids) // len(np.unique(ids)))


def select_svg(
  query: Query,
  key: Key,
  value: Float[Array, 'B T K V'],
  *,
  grid: Grid,
  window: float = 0.25,
  sample: float = 0.01,
  seed: int = 0,
) -> masks.Mask:
  """The spatial or the temporal band, whichever errs less on a sample.

  Spatial: a band of frames; temporal: the same band after sorting tokens by
  place before frame, so slanted stripes; both see the first frame. `window` is
  the band's reach to each side as a share of all tokens, and the error that of
  the output of sampled queries. Sparse VideoGen, Xi et al.,
  https://arxiv.org/abs/2502.01776. O(window T^2).
  """
  _check(grid, query, key)
  F, place = grid[0], grid[1] * grid[2]
  T = F * place
  reach = scoring.count(window, T - 1)
  index = np.arange(T)
  by_place = jnp.asarray(index % place * F + index // place)[None]
  spatial = masks.Window(reach, reach) | masks.Prefix(place)
  temporal = masks.At(masks.Window(reach, reach), by_place, by_place)
  temporal = temporal | masks.Prefix(place)

  rng = np.random.default_rng(seed)
  rows = np.sort(rng.permutation(T)[: scoring.count(sample, T)])

  def output(mask):
    mask = mask and masks.Dense(mask.dense(T, T)[:, :, rows])
    return attention(query[:, rows], key, value, mask=mask)

  full = output(None)
  errors = [
    jnp.square(output(mask) - full).mean((1, 3)) for mask in (spatial, temporal)
  ]
  near = masks.Dense((errors[0] <= errors[1])[..., None, None])
  return near & spatial | ~near & temporal


def select_svg2(
  query: Query,
  key: Key,
  *,
  grid: Grid,
  query_clusters: int = 100,
  key_clusters: int = 500,
  coverage: float = 0.9,
  iterations: int = 10,
) -> masks.Mask:
  """The clusters of keys that hold `coverage` of each cluster of queries.

  P between clusters is softmax_j(qc_i . kc_j / sqrt(H) + log size_j), of
  k-means centres of queries and of keys. Sparse VideoGen 2, Yang et al.,
  https://arxiv.org/abs/2505.18875, which carries centres over from one step of
  denoising to the next. O(T C H) to select.
  """
  _check(grid, query, key)
  key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
  query_ids, centre_q = kmeans(query.swapaxes(1, 2), query_clusters, iterations)
  key_ids, centre_k = kmeans(key.swapaxes(1, 2), key_clusters, iterations)
  size = (key_ids[..., None] == jnp.arange(key_clusters)).sum(2)
  scores = scoring.logits(centre_q.swapaxes(1, 2), centre_k.swapaxes(1, 2))
  scores = scores + jnp.log(size)[:, :, None]
  p = softmax(scores, (size > 0)[:, :, None])
  return _groups(scoring.cover(p, coverage), query_ids, key_ids)


def vmoba_tile(layer: int, grid: Grid, tile: Grid) -> Grid:
  """VMoBA's cycle over layers: spans of time, of space, of both."""
  F, H, W = grid
  f, h, w = tile
  return ((f, H, W), (F, h, w), (f, h, w))[layer % 3]


def select_vmoba(
  query: Query,
  key: Key,
  *,
  grid: Grid,
  tile: Grid,
  coverage: float = 0.25,
) -> masks.Mask:
  """The (query, tile) pairs that hold `coverage` of a head's similarity.

  Pairs of all queries compete: those sure of their tile take fewer. Their
  similarity is softmax_j(q . mean k_j / sqrt(H)). VMoBA, Wu et al.,
  https://arxiv.org/abs/2506.23858; `vmoba_tile` gives the tile of a layer.
  O(T^2 H / tile) to select.
  """
  _check(grid, query, key)
  ids = tile_ids(grid, tile)
  p = jax.nn.softmax(scoring.logits(query, _pool(key, ids)), axis=-1)
  kept = scoring.over_map(scoring.cover, p, coverage)
  return _groups(kept, np.arange(len(ids)), ids)


def select_draft_attention(
  query: Query,
  key: Key,
  *,
  grid: Grid,
  patch: tuple[int, int] = (8, 16),
  share: float = 0.25,
) -> masks.Mask:
  """The largest `share` of a map between patches of frames, by their means.

  DraftAttention, Shen et al., https://arxiv.org/abs/2505.14708, which sorts the
  tokens of a patch side by side so that its tiles are whole. O(T^2 H / patch^2)
  to select.
  """
  _check(grid, query, key)
  ids = tile_ids(grid, (1, *patch))
  scores = scoring.logits(_pool(query, ids), _pool(key, ids))
  p = jax.nn.softmax(scores, axis=-1)
  amount = scoring.count(share, p.shape[2] ** 2)
  return _groups(scoring.over_map(scoring.top, p, amount), ids)


# The orders in which PAROAttention may lay out (frame, height, width).
ORDERS = tuple(itertools.permutations(range(3)))


def positions_in(grid: Grid, order: tuple[int, ...]) -> Int[np.ndarray, 'T']:
  """Where each token stands when the axes are laid out in `order`."""
  tokens = np.arange(math.prod(grid)).reshape(grid).transpose(order)
  return np.argsort(tokens.reshape(-1))


def block_sums(
  p: Float[Array, 'B N T S'], position: Int[np.ndarray, 'T'], size: int
) -> Float[Array, 'B N I I']:
  """The sum of P over blocks of the tokens sorted by `position`."""
  order = np.argsort(position)
  count = scoring.divide(len(order), size)
  p = p[:, :, order][..., order]
  return p.reshape(*p.shape[:2], count, size, count, size).sum((3, 5))


def select_paro(
  query: Query,
  key: Key,
  *,
  grid: Grid,
  block_size: int = 64,
  share: float = 0.25,
  mass: float = 0.9,
) -> masks.Mask:
  """The largest `share` of block sums, in the best order of each head.

  Of the six orders of (frame, height, width) the one in which the fewest blocks
  hold `mass` of P. PAROAttention, Zhao et al.,
  https://arxiv.org/abs/2506.16054, which settles order and blocks offline (and
  weighs into the order how well a block quantises). O(T^2 H) to select.
  """
  _check(grid, query, key)
  p = jax.nn.softmax(scoring.logits(query, key), axis=-1)
  where = np.stack([positions_in(grid, order) for order in ORDERS])
  sums = jnp.stack([block_sums(p, at, block_size) for at in where])
  needed = scoring.cover(sums.reshape(*sums.shape[:3], -1), mass).sum(-1)
  best = jnp.argmin(needed, axis=0)  # [B, N]
  sums = jnp.take_along_axis(sums, best[None, ..., None, None], axis=0)[0]
  amount = scoring.count(share, sums.shape[2] ** 2)
  kept = scoring.over_map(scoring.top, sums, amount)
  return _groups(kept, jnp.asarray(where // block_size)[best])


def select_dit_fast_attention(
  query: Query, key: Key, *, window: int
) -> masks.Mask:
  """A window over all tokens, `window` to each side.

  DiTFastAttn, Yuan et al., https://arxiv.org/abs/2406.08552; see
  `dit_fast_attention` for what makes up for the rest. O(T window).
  """
  return masks.Window(window, window)


def dit_fast_attention(
  query: Query,
  key: Key,
  value: Float[Array, 'B T K V'],
  *,
  window: int,
  residual: Float[Array, 'B T N V'] | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N V']]:
  """Window attention W_t plus R_r = O_r - W_r of an earlier denoising step.

  Returns:
    The output and the residual: exact and new where `residual` is None.
  """
  mask = select_dit_fast_attention(query, key, window=window)
  near = attention(query, key, value, mask=mask)
  if residual is None:
    out = attention(query, key, value)
    return out, out - near
  return near + residual, residual


def select_fps(
  query: Query, key: Key, *, grid: Grid, tile: Grid, window: Grid
) -> masks.Mask:
  """Whole tiles of the grid within a window of `window` tiles.

  FPSAttention, Liu et al., https://arxiv.org/abs/2506.04648, on the pattern of
  sliding-tile attention, https://arxiv.org/abs/2502.04507. O(T tile window).
  """
  _check(grid, query, key)
  tiles = tuple(size // width for size, width in zip(grid, tile, strict=True))
  index = np.arange(math.prod(tiles))
  near = masks.Neighborhood(tiles, window)
  layout = near.pairs(index[:, None], index)[None, None]
  return _groups(layout, tile_ids(grid, tile))
