"""One tile of blockwise attention: its logits, and when it is skipped."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_attn.ops import masks
from efficient_attn.ops.products import product
from efficient_attn.ops.softmax.attention_tiles import by_keys, choose_tiles
from efficient_attn.ops.softmax.hidden import may_hide


@dataclasses.dataclass(frozen=True)
class Options:
  """What is static about a call, beside shapes and the form of the mask."""

  block_q: int
  block_k: int
  scale: float
  soft_cap: float | None  # one that is learned is an operand
  tiles: bytes  # of `tile_schedule`: numpy arrays have no hash
  shared: bool  # whether a tile sticks out
  run_time: bool  # whether the mask decides at run time what is empty
  hides: bool  # whether it may hide a token from all others

  def passes(self, mask: masks.Mask | None):
    """Yields the tiles that are full, without the mask, and then the rest."""
    tiles = np.frombuffer(self.tiles, np.int32).reshape(-1, 3)
    full = tiles[:, 2] == masks.FULL
    for chosen, needed in ((tiles[full], None), (tiles[~full], mask)):
      if len(chosen):
        yield chosen, needed


def unless_empty(options, mask, tile, visit, skip, operand):
  """`visit(operand)`, or `skip(operand)` when run time shows no pair."""
  if mask is None or not options.run_time:
    return visit(operand)
  maybe = mask.maybe(tile.rows, tile.cols)
  return lax.cond(maybe, visit, skip, operand)


def folded(x, shape):
  """[#B, #N, R, C] in the layout of logits [B, K, G * R, C], of `shape`."""
  K, rows, C = shape
  heads = K
  if x.shape[1] == 1:
    R = x.shape[2]
    x, heads = jnp.broadcast_to(x, (x.shape[0], rows // R, R, C)), 1
  return x.reshape(x.shape[0], heads, rows, C)


def admitted_by(mask, tile, shape):
  """Returns the mask of a tile's logits, or None if all of them count."""
  found = tile.own
  if mask is not None:
    admitted = mask.tile(tile.rows, tile.cols)
    found = admitted if found is None else admitted & found
  return None if found is None else folded(found, shape)


def logits_of(options, q, k, admitted, bias, cap, tile, turned=False):
  """Logits [B, K, G * R, C] of one tile, d(capped) / d(scaled) and / d(cap).

  `turned` to [B, K, C, G * R], in which three of the five matmuls of the
  backward pass need no transpose, and two of those of [G * R, C].
  """

  def turn(x):
    return x.swapaxes(2, 3) if turned else x

  if turned:
    s = options.scale * product('bkch,bkrh->bkcr', k, q)
  else:
    s = options.scale * product('bkrh,bkch->bkrc', q, k)
  slope = of_cap = None
  cap = options.soft_cap if cap is None else cap.astype(s.dtype)
  if cap is not None:
    capped = jnp.tanh(s / cap)
    slope = 1 - capped * capped
    of_cap = capped - s / cap * slope
    s = cap * capped
  if bias is not None:
    shape = k.shape[1], q.shape[2], k.shape[2]
    added = folded(bias.tile(tile.rows, tile.cols), shape)
    s = s + turn(added).astype(s.dtype)
  if admitted is not None:
    s = jnp.where(turn(admitted), s, -jnp.inf)
  return s, slope, of_cap


def make_options(
  mask: masks.Mask | None,
  T: int,
  S: int,
  *,
  scale: float,
  soft_cap: float | None,
  block_q: int | None = None,
  block_k: int | None = None,
  order: str = 'query',
) -> Options:
  """Chooses the tiles of a call, and looks at the form of its mask."""
  block_q, block_k, tiles = choose_tiles(mask, T, S, block_q, block_k)
  if order == 'key':
    tiles = by_keys(tiles)
  corner = jnp.arange(block_q), jnp.arange(block_k)
  return Options(
    block_q=block_q,
    block_k=block_k,
    scale=scale,
    soft_cap=soft_cap,
    tiles=tiles.tobytes(),
    shared=bool(T % block_q or (tiles[:, 1] > S - block_k).any()),
    run_time=mask is not None and mask.maybe(*corner) is not True,
    hides=may_hide(mask, T, S),
  )
