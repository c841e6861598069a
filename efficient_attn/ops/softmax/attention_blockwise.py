"""Softmax attention one tile at a time: O(T) memory forward and backward.

Online softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021). For the tiles j
of one block of query rows,

    m' = max(m, max_j s_j)     p_j = exp(s_j - m')     a = exp(m - m')
    l' = a l + sum p_j         o' = a o + p_j v_j

and at the end out = o / l. The backward pass recomputes p = exp(s - m) / l from
m and l, not from m + log l, which loses log l once logits are large; with
d = rowsum(do * out) - l dl,

    dv_j += p^T do   ds = p * (do v_j^T - d)   dq += ds k_j   dk_j += ds^T q

The mask's block map gives, at trace time, the list of tiles that hold
anything. One `lax.scan` walks those that are full and need no mask, and one the
rest, so the trip counts are static and a tile that admits nothing costs
nothing. What only run time can tell to be empty, as with packed segments, is
skipped by a `lax.cond`. Time O(visited tiles), memory O(T + S). Reference:
`attention_reference`. First-order reverse mode only.

The lists go block of queries by block of queries, as in FlashAttention-2 (Dao
2023); with order='key' they go by blocks of keys, as in FlashAttention (Dao et
al. 2022).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from efficient_attn.ops import masks, scores
from efficient_attn.ops.products import product
from efficient_attn.ops.shapes import Scalar, fold_scale
from efficient_attn.ops.softmax.attention_blockwise_tile import (
  Options,
  admitted_by,
  logits_of,
  make_options,
  unless_empty,
)
from efficient_attn.ops.softmax.attention_tiles import (
  add_at,
  locate,
  put_rows,
  take_cols,
  take_rows,
)
from efficient_attn.ops.softmax.hidden import without_hidden
from efficient_attn.ops.softmax.stats import Stats, exp_below

ORDERS = ('query', 'key')


def attention_blockwise(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  mask: masks.Mask | None = None,
  bias: scores.Score | None = None,
  scale: Scalar | None = None,
  logits_soft_cap: Scalar | None = None,
  sinks: Float[Array, 'N'] | None = None,
  block_q: int | None = None,
  block_k: int | None = None,
  order: str = 'query',
) -> tuple[Float[Array, 'B T N V'], Stats]:
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
    block_q: most rows of a tile; None for what suits the mask.
    block_k: most columns of a tile; None for what suits the mask.
    order: the outer loop, over blocks of queries ('query', FlashAttention-2)
      or of keys ('key', FlashAttention).

  Returns:
    The output in the query's dtype, 0 where a row attends to nothing, and the
    softmax denominators in at least float32.
  """
  T, S = query.shape[1], key.shape[1]
  if order not in ORDERS:
    raise ValueError(f'order = {order!r}: pass one of {ORDERS}.')
  query, scale = fold_scale(
    query, query.shape[-1] ** -0.5 if scale is None else scale
  )
  learned = not isinstance(logits_soft_cap, (float, int, type(None)))
  options = make_options(
    mask,
    T,
    S,
    scale=scale,
    soft_cap=None if learned else logits_soft_cap,
    block_q=block_q,
    block_k=block_k,
    order=order,
  )
  cap = jnp.asarray(logits_soft_cap) if learned else None
  return attend(options, query, key, value, mask, bias, sinks, cap, run=_attend)


def attend(
  options: Options,
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  mask: masks.Mask | None,
  bias: scores.Score | None,
  sinks: Float[Array, 'N'] | None,
  cap: Float[Array, ''] | None = None,
  run: Callable | None = None,
) -> tuple[Float[Array, 'B T N V'], Stats]:
  """Returns what `attention_blockwise` does, without its gradient.

  Takes the options and arguments of a call, its learned soft cap, and what
  runs in place of the plain loop.
  """
  out, stats = (run or _run)(
    options,
    _grouped(query, value),
    *map(_heads_first, (key, value)),
    mask,
    bias,
    None if sinks is None else sinks.reshape(value.shape[2], -1),
    cap,
  )
  B, T, N, _ = query.shape
  return _ungrouped(out, N), jax.tree.map(lambda x: _ungrouped(x, N), stats)


def gradients(
  options: Options,
  args: tuple,
  out: Float[Array, 'B T N V'],
  stats: Stats,
  cotangents: tuple[Float[Array, 'B T N V'], Stats],
) -> tuple:
  """The cotangents of query, key, value, mask, bias and sinks.

  Args:
    options: of the call.
    args: query, key, value, mask, bias and sinks.
    out: what `attend` returned.
    stats: what `attend` returned.
    cotangents: of both.
  """
  query, key, value, mask, bias, sinks = args
  grouped = functools.partial(jax.tree.map, lambda x: _grouped(x, value))
  residuals = (
    _grouped(query, value),
    *map(_heads_first, (key, value)),
    mask,
    bias,
    None if sinks is None else sinks.reshape(value.shape[2], -1),
    None,
    *grouped((out, stats)),
  )
  dq, dk, dv, _, dbias, dsinks, _ = _attend_backward(
    options, residuals, grouped(cotangents)
  )
  return (
    _ungrouped(dq, query.shape[2]),
    *map(_heads_first, (dk, dv)),
    None,
    dbias,
    None if sinks is None else dsinks.reshape(-1),
  )


def _heads_first(x):
  return x.transpose(0, 2, 1, 3)


def _grouped(x, value):
  """[B, T, N, ...] to [B, K, G, T, ...]."""
  x = jnp.moveaxis(x, 1, 2)
  return x.reshape(x.shape[0], value.shape[2], -1, *x.shape[2:])


def _ungrouped(x, heads):
  """[B, K, G, T, ...] to [B, T, N, ...]."""
  return jnp.moveaxis(x.reshape(x.shape[0], heads, *x.shape[3:]), 1, 2)


def _run(options, q, k, v, mask, bias, sinks, cap):
  """[B,K,G,T,H] [B,K,S,H] [B,K,S,V] -> out [B,K,G,T,V], Stats [B,K,G,T]."""
  B, K, G, T, _ = q.shape
  S, R, C = k.shape[2], options.block_q, options.block_k
  stats = jnp.promote_types(q.dtype, jnp.float32)
  # A sink is a key that every row has seen before the first tile: logit sink,
  # value 0.
  if sinks is None:
    m, l = jnp.full((K, G, 1), -jnp.inf, stats), 0.0
  else:
    m, l = sinks.astype(stats)[..., None], 1.0
  rows = (
    jnp.broadcast_to(m, (B, K, G, T)),
    jnp.full((B, K, G, T), l, stats),
    jnp.zeros((B, K, G, T, v.shape[-1]), stats),
  )

  def step(rows, entry, mask):
    tile = locate(R, C, *entry[:2], T, S, options.shared)
    running = jax.tree.map(lambda x: take_rows(x, tile), rows)
    running = _absorb(options, q, k, v, mask, bias, cap, tile, running)
    return _put(rows, running, tile), None

  for tiles, needed in options.passes(mask):
    rows, _ = lax.scan(functools.partial(step, mask=needed), rows, tiles)
  return _finish(*rows, q.dtype)


_attend = jax.custom_vjp(_run, nondiff_argnums=(0,))


def _absorb(options, q, k, v, mask, bias, cap, tile, running):
  """(m, l, o) of the rows of a tile, after its keys."""

  def visit(running):
    m, l, acc = running
    qi, kj, vj = take_rows(q, tile), take_cols(k, tile), take_cols(v, tile)
    shape = kj.shape[1], qi.shape[2], kj.shape[2]
    admitted = admitted_by(mask, tile, shape)
    if options.hides and admitted is not None:
      qi, kj, vj = without_hidden(admitted, qi, kj, vj)
    s, *_ = logits_of(options, qi, kj, admitted, bias, cap, tile)
    top = lax.stop_gradient(jnp.maximum(m, jnp.max(s, axis=-1)))
    anchor = jnp.where(top == -jnp.inf, 0, top)
    p = exp_below(s, anchor[..., None])
    decay = jnp.exp(m - anchor)
    pv = product('bkrc,bkcv->bkrv', p.astype(v.dtype), vj)
    l = l * decay + jnp.sum(p, axis=-1)
    return top, l, acc * decay[..., None] + pv

  return unless_empty(options, mask, tile, visit, lambda x: x, running)


def _finish(m, l, acc, dtype):
  """The output and the denominator of rows that have seen every key."""
  stats = Stats(jnp.where(l == 0, 0, m), l)
  return stats.divide(acc).astype(dtype), stats


def _put(rows, running, tile):
  """(m, l, o) of all rows [B, K, G, T, ...] with those of a tile's rows."""
  T, R = rows[0].shape[3], tile.rows.size

  def put(total, new):
    new = new.reshape(*total.shape[:3], R, *total.shape[4:])
    return put_rows(total, new, tile, T % R != 0)

  return jax.tree.map(put, rows, running)


def _attend_forward(options, q, k, v, mask, bias, sinks, cap):
  out, stats = _attend(options, q, k, v, mask, bias, sinks, cap)
  return (out, stats), (q, k, v, mask, bias, sinks, cap, out, stats)


def _attend_backward(options, residuals, cotangents):
  q, k, v, mask, bias, sinks, cap, out, (top, total) = residuals
  dout, (_, dtotal) = cotangents  # top has no gradient
  B, K, G, T, _ = q.shape
  S, R, C = k.shape[2], options.block_q, options.block_k
  stats = total.dtype

  # As a dot: XLA sums short rows on a CPU twenty times slower.
  delta = product('bkgtv,bkgtv->bkgt', dout, out) - total * dtotal
  share = jnp.where(total == 0, 0, 1 / total)  # of a weight 1

  def step(carry, entry, mask):
    dq, dk, dv, *others = carry
    tile = locate(R, C, *entry[:2], T, S, options.shared)

    def visit(others):
      dbias, dcap = others
      qi, doi = take_rows(q, tile), take_rows(dout, tile)
      kj, vj = take_cols(k, tile), take_cols(v, tile)
      shape = K, qi.shape[2], C
      admitted = admitted_by(mask, tile, shape)
      if options.hides and admitted is not None:
        qi, kj, vj = without_hidden(admitted, qi, kj, vj)
      s, slope, of_cap = logits_of(
        options, qi, kj, admitted, bias, cap, tile, turned=True
      )
      p = exp_below(s, take_rows(top, tile)[..., None, :])
      p = p * take_rows(share, tile)[..., None, :]
      dp = product('bkcv,bkrv->bkcr', vj, doi)
      ds = p * (dp - take_rows(delta, tile)[..., None, :])
      if bias is not None:
        full = ds.swapaxes(2, 3).reshape(B, K * G, R, C)
        dbias = bias.accumulate(dbias, tile.rows, tile.cols, full)
      if cap is not None:
        dcap = dcap + jnp.sum(ds * of_cap)
      if slope is not None:
        ds = ds * slope
      ds = (options.scale * ds).astype(q.dtype)
      dqi = product('bkcr,bkch->bkrh', ds, kj).reshape(B, K, G, R, -1)
      dkj = product('bkcr,bkrh->bkch', ds, qi)
      dvj = product('bkcr,bkrv->bkcv', p.astype(v.dtype), doi)
      return dqi, dkj, dvj, [dbias, dcap]

    def skip(others):
      zeros = (
        jnp.zeros((B, K, G, R, q.shape[-1]), stats),
        jnp.zeros((B, K, C, k.shape[-1]), stats),
        jnp.zeros((B, K, C, v.shape[-1]), stats),
      )
      return *zeros, others

    dqi, dkj, dvj, others = unless_empty(
      options, mask, tile, visit, skip, others
    )
    dq = add_at(dq, dqi, tile.row_start, axis=3)
    dk = add_at(dk, dkj, tile.col_start, axis=2)
    dv = add_at(dv, dvj, tile.col_start, axis=2)
    return (dq, dk, dv, *others), None

  def zeros(x):
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros(x.shape, stats if inexact else x.dtype)

  carry = jax.tree.map(zeros, (q, k, v, bias, cap))
  for tiles, needed in options.passes(mask):
    carry, _ = lax.scan(functools.partial(step, mask=needed), carry, tiles)
  dq, dk, dv, dbias, dcap = carry

  def cotangent(x, dx):
    if jnp.issubdtype(x.dtype, jnp.inexact):
      return dx.astype(x.dtype)
    return np.zeros(x.shape, jax.dtypes.float0)

  dsinks = None
  if sinks is not None:
    p = share * exp_below(sinks.astype(stats)[..., None], top)
    dsinks = -jnp.sum(p * delta, axis=(0, 3))
  primal = (q, k, v, bias, sinks, cap)
  found = (dq, dk, dv, dbias, dsinks, dcap)
  dq, dk, dv, *rest = jax.tree.map(cotangent, primal, found)
  return dq, dk, dv, None, *rest


_attend.defvjp(_attend_forward, _attend_backward)
