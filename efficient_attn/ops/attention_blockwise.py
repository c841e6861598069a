"""Softmax attention one tile at a time: O(T) memory forward and backward.

Online softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021) in the schedule
of FlashAttention-2 (Dao 2023). For the tiles j of one block of query rows,

    m' = max(m, max_j s_j)     p_j = exp(s_j - m')     a = exp(m - m')
    l' = a l + sum p_j         o' = a o + p_j v_j

and at the end out = o / l, lse = m + log l. The backward pass recomputes p
from lse; with d = rowsum(do * out) - dlse,

    dv_j += p^T do   ds = p * (do v_j^T - d)   dq += ds k_j   dk_j += ds^T q

The mask's block map gives, at trace time, the list of tiles that hold
anything. One `lax.scan` walks that list, so its trip count is static and a tile
that admits nothing costs nothing. What only run time can tell to be empty, as
with packed segments, is skipped by a `lax.cond`. Time O(visited tiles), memory
O(T + S). Reference: `attention_reference`. First-order reverse mode only.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from efficient_attn.ops import masks, scores

# Eight heads of float32 logits are 4 MiB, and the matmuls are large enough for
# XLA to use every core of a CPU; 128 x 128 takes 1.6 times as long.
BLOCK_Q, BLOCK_K = 512, 256


def attention_blockwise(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  mask: masks.Mask | None = None,
  bias: scores.Score | None = None,
  scale: float | None = None,
  logits_soft_cap: float | None = None,
  sinks: Float[Array, 'N'] | None = None,
  block_q: int = BLOCK_Q,
  block_k: int = BLOCK_K,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Attention that never holds more than a tile of logits.

  Args:
    query: queries.
    key: keys.
    value: values.
    mask: which keys each query may attend to; None admits all.
    bias: what is added to the scaled and capped logits.
    scale: factor of the logits, H**-0.5 by default.
    logits_soft_cap: c in c tanh(logits / c).
    sinks: one logit per head that joins the denominator.
    block_q: most rows of a tile.
    block_k: most columns of a tile.

  Returns:
    The output in the query's dtype, and the log of the softmax denominator in
    at least float32; 0 and -inf where a row attends to nothing.
  """
  B, T, N, H = query.shape
  S, K, V = value.shape[1:]
  options = _Options(
    block_q=fit_block(T, block_q),
    block_k=fit_block(S, block_k),
    scale=H**-0.5 if scale is None else scale,
    soft_cap=logits_soft_cap,
  )
  out, lse = _attend(
    options,
    query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4),
    key.transpose(0, 2, 1, 3),
    value.transpose(0, 2, 1, 3),
    mask,
    bias,
    None if sinks is None else sinks.reshape(K, N // K),
  )
  out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, V)
  return out, lse.transpose(0, 3, 1, 2).reshape(B, T, N)


def fit_block(length: int, block: int) -> int:
  """The size of the fewest equal blocks of at most `block` that cover."""
  return -(-length // -(-length // block))


def tile_schedule(
  mask: masks.Mask | None, T: int, S: int, block_q: int, block_k: int
) -> Int32[np.ndarray, 'tiles 4']:
  """The tiles that are visited, row by row.

  Returns:
    One row per tile: the block row i, the block column j, the kind (PARTIAL
    or FULL), and whether it is the first tile of block row i.
  """
  if mask is None:
    shape = (-(-T // block_q), -(-S // block_k))
    kinds = np.full(shape, masks.FULL, np.int8)
  else:
    kinds = mask.block_map(T, S, block_q, block_k)
  i, j = np.nonzero(kinds != masks.EMPTY)
  first = np.diff(i, prepend=-1) != 0
  return np.stack([i, j, kinds[i, j], first], axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Options:
  """What is static about a call, beside shapes and the form of the mask."""

  block_q: int
  block_k: int
  scale: float
  soft_cap: float | None


class _Tile(NamedTuple):
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


def _locate(options, i, j, T, S):
  R, C = options.block_q, options.block_k
  row_start, col_start = jnp.minimum(i * R, T - R), jnp.minimum(j * C, S - C)
  rows, cols = row_start + jnp.arange(R), col_start + jnp.arange(C)
  own_rows, own_cols = rows >= i * R, cols >= j * C
  own = (own_rows[:, None] & own_cols)[None, None]
  shared = T % R != 0 or S % C != 0
  return _Tile(
    row_start, col_start, rows, cols, own_rows, own if shared else None
  )


def _schedule(options, mask, T, S):
  """The schedule, and the mask unless every visited tile is full.

  Where only some are full the mask is applied to those too: on a CPU that is
  free, and a `lax.cond` around it would stop a GPU at every tile.
  """
  tiles = tile_schedule(mask, T, S, options.block_q, options.block_k)
  return tiles, mask if (tiles[:, 2] == masks.PARTIAL).any() else None


def _unless_empty(mask, tile, visit, skip, operand):
  """`visit(operand)`, or `skip(operand)` when run time shows no pair."""
  maybe = True if mask is None else mask.maybe(tile.rows, tile.cols)
  if maybe is True:
    return visit(operand)
  return lax.cond(maybe, visit, skip, operand)


def _take_rows(x, tile):
  """[B, K, G, T, ...] -> [B, K, G * R, ...]: a group shares one matmul."""
  x = lax.dynamic_slice_in_dim(x, tile.row_start, tile.rows.size, axis=3)
  return x.reshape(x.shape[:2] + (-1,) + x.shape[4:])


def _take_cols(x, tile):
  """[B, K, S, ...] -> [B, K, C, ...]."""
  return lax.dynamic_slice_in_dim(x, tile.col_start, tile.cols.size, axis=2)


def _add_at(total, update, start, axis):
  """Adds to a slice, in place under XLA."""
  old = lax.dynamic_slice_in_dim(total, start, update.shape[axis], axis)
  return lax.dynamic_update_slice_in_dim(total, old + update, start, axis)


def _dot(pattern, a, b):
  stats = jnp.promote_types(a.dtype, jnp.float32)
  return jnp.einsum(pattern, a, b, preferred_element_type=stats)


def _logits(options, q, k, mask, bias, tile):
  """Logits [B, K, G * R, C] of one tile, and d(capped) / d(scaled)."""
  K, rows = q.shape[1:3]
  R, C = tile.rows.size, tile.cols.size

  def folded(x):  # [#B, #N, R, C] -> broadcastable to the logits
    if x.shape[1] == 1:
      x = jnp.broadcast_to(x, (x.shape[0], rows // R, R, C))
      return x.reshape(x.shape[0], 1, rows, C)
    return x.reshape(x.shape[0], K, rows, C)

  s = options.scale * _dot('bkrh,bkch->bkrc', q, k)
  slope = None
  if options.soft_cap is not None:
    capped = jnp.tanh(s / options.soft_cap)
    s, slope = options.soft_cap * capped, 1 - capped * capped
  if bias is not None:
    s = s + folded(bias.tile(tile.rows, tile.cols)).astype(s.dtype)
  if mask is not None:
    s = jnp.where(folded(mask.tile(tile.rows, tile.cols)), s, -jnp.inf)
  if tile.own is not None:
    s = jnp.where(folded(tile.own), s, -jnp.inf)
  return s, slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, mask, bias, sinks):
  """[B,K,G,T,H] [B,K,S,H] [B,K,S,V] -> out [B,K,G,T,V], lse [B,K,G,T]."""
  B, K, G, T, _ = q.shape
  S, V = v.shape[2:]
  R = options.block_q
  stats = jnp.promote_types(q.dtype, jnp.float32)
  tiles, mask = _schedule(options, mask, T, S)

  # A sink is a key that every row has seen before the first tile: logit sink,
  # value 0.
  if sinks is None:
    m0, l0 = jnp.full((K, G, 1), -jnp.inf, stats), 0.0
  else:
    m0, l0 = sinks.astype(stats)[..., None], 1.0
  m0 = jnp.broadcast_to(m0, (B, K, G, R)).reshape(B, K, G * R)

  def step(carry, entry):
    m, l, acc, out, lse = carry
    i, j, _, first = entry
    tile = _locate(options, i, j, T, S)
    m = jnp.where(first, m0, m)
    l = jnp.where(first, l0, l)
    # Not through a factor 0: what another row holds may not be finite.
    acc = jnp.where(first, 0, acc)

    def visit(running):
      m, l, acc = running
      s, _ = _logits(
        options, _take_rows(q, tile), _take_cols(k, tile), mask, bias, tile
      )
      top = jnp.maximum(m, jnp.max(s, axis=-1))
      anchor = jnp.where(top == -jnp.inf, 0, top)
      p = jnp.exp(s - anchor[..., None])
      decay = jnp.exp(m - anchor)
      pv = _dot('bkrc,bkcv->bkrv', p.astype(v.dtype), _take_cols(v, tile))
      l = l * decay + jnp.sum(p, axis=-1)
      return top, l, acc * decay[..., None] + pv

    m, l, acc = _unless_empty(mask, tile, visit, lambda x: x, (m, l, acc))

    # Written at every tile: the last one of a row block is the one that stays.
    nothing = l == 0
    total = jnp.where(nothing, 1, l)
    o = (acc / total[..., None]).astype(out.dtype).reshape(B, K, G, R, V)
    e = jnp.where(nothing, -jnp.inf, m + jnp.log(total)).reshape(B, K, G, R)
    if T % R != 0:
      own = tile.own_rows
      old = lax.dynamic_slice_in_dim(out, tile.row_start, R, axis=3)
      o = jnp.where(own[:, None], o, old)
      old = lax.dynamic_slice_in_dim(lse, tile.row_start, R, axis=3)
      e = jnp.where(own, e, old)
    out = lax.dynamic_update_slice_in_dim(out, o, tile.row_start, axis=3)
    lse = lax.dynamic_update_slice_in_dim(lse, e, tile.row_start, axis=3)
    return (m, l, acc, out, lse), None

  carry = (
    m0,
    jnp.zeros((B, K, G * R), stats),
    jnp.zeros((B, K, G * R, V), stats),
    # What a row block without any tile returns.
    jnp.zeros((B, K, G, T, V), q.dtype),
    jnp.broadcast_to(m0.reshape(B, K, G, R)[..., :1], (B, K, G, T)),
  )
  (_, _, _, out, lse), _ = lax.scan(step, carry, tiles)
  return out, lse


def _attend_forward(options, q, k, v, mask, bias, sinks):
  out, lse = _attend(options, q, k, v, mask, bias, sinks)
  return (out, lse), (q, k, v, mask, bias, sinks, out, lse)


def _attend_backward(options, residuals, cotangents):
  q, k, v, mask, bias, sinks, out, lse = residuals
  dout, dlse = cotangents
  B, K, G, T, _ = q.shape
  S, R, C = k.shape[2], options.block_q, options.block_k
  stats = lse.dtype
  tiles, needed_mask = _schedule(options, mask, T, S)

  nothing = lse == -jnp.inf
  delta = jnp.sum(dout.astype(stats) * out.astype(stats), axis=-1) - dlse
  delta = jnp.where(nothing, 0, delta)
  lse = jnp.where(nothing, 0, lse)

  def step(carry, entry):
    dq, dk, dv, dbias = carry
    i, j = entry[:2]
    tile = _locate(options, i, j, T, S)

    def visit(dbias):
      qi, doi = _take_rows(q, tile), _take_rows(dout, tile)
      kj, vj = _take_cols(k, tile), _take_cols(v, tile)
      s, slope = _logits(options, qi, kj, needed_mask, bias, tile)
      p = jnp.exp(s - _take_rows(lse, tile)[..., None])
      dp = _dot('bkrv,bkcv->bkrc', doi, vj)
      ds = p * (dp - _take_rows(delta, tile)[..., None])
      if bias is not None:
        full = ds.reshape(B, K * G, R, C)
        dbias = bias.accumulate(dbias, tile.rows, tile.cols, full)
      if slope is not None:
        ds = ds * slope
      ds = (options.scale * ds).astype(q.dtype)
      dqi = _dot('bkrc,bkch->bkrh', ds, kj).reshape(B, K, G, R, -1)
      dkj = _dot('bkrc,bkrh->bkch', ds, qi)
      dvj = _dot('bkrc,bkrv->bkcv', p.astype(v.dtype), doi)
      return dqi, dkj, dvj, dbias

    def skip(dbias):
      zeros = (
        jnp.zeros((B, K, G, R, q.shape[-1]), stats),
        jnp.zeros((B, K, C, k.shape[-1]), stats),
        jnp.zeros((B, K, C, v.shape[-1]), stats),
      )
      return *zeros, dbias

    dqi, dkj, dvj, dbias = _unless_empty(needed_mask, tile, visit, skip, dbias)
    dq = _add_at(dq, dqi, tile.row_start, axis=3)
    dk = _add_at(dk, dkj, tile.col_start, axis=2)
    dv = _add_at(dv, dvj, tile.col_start, axis=2)
    return (dq, dk, dv, dbias), None

  def zeros(x):
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros(x.shape, stats if inexact else x.dtype)

  carry = jax.tree.map(zeros, (q, k, v, bias))
  (dq, dk, dv, dbias), _ = lax.scan(step, carry, tiles)

  def cotangent(x, dx):
    if jnp.issubdtype(x.dtype, jnp.inexact):
      return dx.astype(x.dtype)
    return np.zeros(x.shape, jax.dtypes.float0)

  dsinks = None
  if sinks is not None:
    p = jnp.exp(sinks.astype(stats)[..., None] - lse)
    dsinks = -jnp.sum(jnp.where(nothing, 0, p * delta), axis=(0, 3))
  primal = (q, k, v, bias, sinks)
  found = (dq, dk, dv, dbias, dsinks)
  dq, dk, dv, dbias, dsinks = jax.tree.map(cotangent, primal, found)
  return dq, dk, dv, None, dbias, dsinks


_attend.defvjp(_attend_forward, _attend_backward)
