"""The backward pass.

With p = e^(s - m) / l made again, and d = rowsum(do * out) - l dl,

    dv_j += p^T do    ds = p * (do v_j^T - d)    dq += ds k_j    dk_j += ds^T q

Keys run along the first axis of a tile, so that the statistics are rows, and
of five products only that of dq takes a transposed operand. dq stands in the
VMEM for a block of queries, dk and dv for a span of keys while all blocks of
all heads of a group pass. With several spans dq has a kernel of its own, whose
last axis are the spans: no part of a gradient is summed outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.attention.layout import (
  NN,
  NT,
  TN,
  Options,
  Tiles,
  by_head,
  by_token,
  call,
  dot,
  rows_of,
)
from efficient_attn.kernels.attention.terms import LANES, column
from efficient_attn.kernels.attention.tiles import FULL


@functools.partial(jax.jit, static_argnames='options')
def backward(
  query, key, value, d_out, top, share, delta, operands, *, options: Options
):
  """The cotangents of query, key, value, and of what is learned of the bias.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].
    d_out: [B, T, N, V].
    top: the largest logits, [B, T, N].
    share: 1 / l, 0 for a row without keys, [B, T, N].
    delta: d, [B, T, N].
    operands: see `forward`.
    options: what is static.
  """
  s = options.schedule
  stats = jnp.stack([rows_of(x, s) for x in (top, share, delta)], axis=3)
  T, S = s.padded
  arrays = [
    by_head(query, T), by_head(d_out, T), by_head(key, S), by_head(value, S),
    stats,
  ]  # fmt: skip
  run = functools.partial(_call, arrays, operands, options)
  if s.num_spans == 1:
    d_q, d_k, d_v, *learned = run(('query', 'key'))
  else:
    d_q, *_ = run(('query',))
    d_k, d_v, *learned = run(('key',))
  learned = [jnp.sum(x[..., 0], axis=2) for x in learned]
  lengths = query.shape[1], key.shape[1], key.shape[1]
  return *map(by_token, (d_q, d_k, d_v), lengths), learned


def _call(arrays, operands, options, wanted):
  q, _, k, v, _ = arrays
  s = options.schedule
  R, C, span = s.rows, s.cols, s.span
  (B, N, _, H), (_, K, _, V) = q.shape, v.shape
  group = N // K
  # Spans before blocks where gradients of keys wait for all blocks.
  grid = (B, K, s.num_spans, group, s.num_blocks)
  if 'key' not in wanted:
    grid = (B, K, group, s.num_blocks, s.num_spans)

  def place(*ids):
    b, kv, *rest = ids
    p, g, i = rest if 'key' in wanted else (rest[2], rest[0], rest[1])
    return b, kv * group + g, i, p

  def spec(block, index):
    return pl.BlockSpec(
      block, lambda *ids: index(ids[0], ids[1], *place(*ids[:5])[1:])
    )

  def queries(width):
    return spec((1, 1, R, width), lambda b, kv, n, i, p: (b, n, i, 0))

  def keys(width):
    return spec((1, 1, span * C, width), lambda b, kv, n, i, p: (b, kv, p, 0))

  rows = spec((1, 1, 1, 3, R), lambda b, kv, n, i, p: (b, n, i, 0, 0))
  specs = [queries(H), queries(V), keys(H), keys(V), rows]
  outputs, scratch = [], []
  if 'query' in wanted:
    outputs.append((q.shape, q.dtype, queries(H)))
    scratch.append(pltpu.VMEM((R, H), jnp.float32))
  if 'key' in wanted:
    outputs += [(x.shape, x.dtype, keys(x.shape[-1])) for x in (k, v)]
    scratch += [pltpu.VMEM((span * C, width), jnp.float32) for width in (H, V)]
    for _ in options.bias.learned if options.bias else ():
      index = lambda b, kv, n, i, p: (b, n, p, 0, 0)  # noqa: E731
      outputs.append((
        (B, N, s.num_spans, 1, LANES),
        jnp.float32,
        spec((1, 1, 1, 1, LANES), index),
      ))  # fmt: skip
  tiles = len(s.tiles) // 4 * R * C * B * N
  found = call(
    functools.partial(_backward, options=options, wanted=wanted, grid=grid),
    options,
    place,
    grid,
    operands,
    list(zip(arrays, specs, strict=True)),
    outputs,
    scratch,
    '_'.join(('attention_backward', *wanted)),
    ('parallel', 'parallel', 'arbitrary', 'arbitrary', 'arbitrary'),
    (tiles * (H + V + ('query' in wanted) * H + ('key' in wanted) * (H + V)),
     tiles),
  )  # fmt: skip
  extra = outputs[('query' in wanted) + 2 * ('key' in wanted) :]
  if not extra:
    return found
  return *found[: -len(extra)], *(x[:, :, :, 0] for x in found[-len(extra) :])


def _backward(
  scalars, place, masks, biases, inputs, outputs, scratch,
  *, options, wanted, grid,
):  # fmt: skip
  q_ref, do_ref, k_ref, v_ref, stats_ref = inputs
  outputs, scratch = list(outputs), list(scratch)
  dq_out, dq_ref = (
    (outputs.pop(0), scratch.pop(0)) if 'query' in wanted else (None, None)
  )
  dk_out = dv_out = dk_ref = dv_ref = None
  if 'key' in wanted:
    dk_out, dv_out, *learned = outputs
    dk_ref, dv_ref = scratch
  else:
    learned = []
  schedule = options.schedule
  C = schedule.cols
  *_, i, p = place
  keys_begin = (pl.program_id(3) == 0) & (i == 0)
  keys_end = (pl.program_id(3) == grid[3] - 1) & (i == grid[4] - 1)

  def each_tile(body):
    jax.lax.fori_loop(
      0,
      schedule.span,
      lambda tile, _: body(pl.ds(pl.multiple_of(tile * C, LANES), C)),
      None,
    )

  def finish(at):
    dk_out[0, 0, at] = (dk_ref[at] * options.scale).astype(dk_out.dtype)
    dv_out[0, 0, at] = dv_ref[at].astype(dv_out.dtype)

  if 'key' in wanted:

    @pl.when(keys_begin)
    def _():
      each_tile(lambda at: _fill(at, dk_ref, dv_ref))

    @pl.when(i == 0)
    def _():
      for ref in learned:
        ref[...] = jnp.zeros_like(ref)

  if 'query' in wanted:

    @pl.when((p == 0) | ('key' in wanted))
    def _():
      dq_ref[...] = jnp.zeros_like(dq_ref)

  tiles = Tiles(options, scalars, masks, biases, place, turned=True)

  def visit(tile, kind):
    # One step of both pieces after another, so that their chains interleave.
    pieces = schedule.pieces(kind)
    operands, logits, gradients = [], [], []
    for rows, cols in pieces:
      at = pl.ds(
        pl.multiple_of(tile * C + cols.start, LANES), cols.stop - cols.start
      )
      q, do = q_ref[0, 0, rows], do_ref[0, 0, rows]
      k, v = k_ref[0, 0, at], v_ref[0, 0, at]
      admitted = None if kind == FULL else tiles.admitted(tile, rows, cols)
      if options.hides and admitted is not None:
        some = admitted.astype(jnp.float32)
        seen = jnp.max(some, axis=1, keepdims=True) > 0
        sees = column(jnp.max(some, axis=0, keepdims=True)) > 0
        q = jnp.where(sees, q, 0)
        k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
      operands.append((at, q, k, do))
      logits.append(tiles.logits(q, k, tile, rows, cols, admitted))
      gradients.append(dot(v, do, NT))
    weights, slopes = [], []
    for (rows, cols), (s, slope), dp in zip(
      pieces, logits, gradients, strict=True
    ):
      top, share, delta = (
        stats_ref[0, 0, 0, r : r + 1, rows] for r in range(3)
      )
      # Not above 0, though products round otherwise than in the forward pass.
      p = jnp.exp(jnp.minimum(s - top, 0)) * share
      ds = p * (dp - delta)
      if learned:
        for ref, grad in zip(
          learned, _learned(tiles.bias, ds, tile, rows, cols), strict=True
        ):
          ref[...] += grad
      weights.append(p)
      slopes.append(ds if slope is None else ds * slope)
    for (rows, _), (at, q, k, do), p, ds in zip(
      pieces, operands, weights, slopes, strict=True
    ):
      ds = ds.astype(q.dtype)
      if 'key' in wanted:
        dv_ref[at] += dot(p.astype(do.dtype), do, NN)
        dk_ref[at] += dot(ds, q, NN)
      if 'query' in wanted:
        dq_ref[rows] += dot(ds, k, TN)

  tiles.loop(visit)

  if 'query' in wanted:

    @pl.when((p == schedule.num_spans - 1) | ('key' in wanted))
    def _():
      dq_out[0, 0] = (dq_ref[...] * options.scale).astype(dq_out.dtype)

  if 'key' in wanted:

    @pl.when(keys_end)
    def _():
      each_tile(finish)


def _fill(at, *refs):
  for ref in refs:
    ref[at] = jnp.zeros_like(ref[at])


def _learned(bias, ds, tile, rows, cols):
  """The gradients of scalars, [1, 1, 1, 1, 1] each."""
  query, key = bias.positions(tile, rows, cols)
  arrays = bias.arrays(tile, rows, cols)

  def of(*scalars):
    found = list(arrays)
    for place, scalar in zip(bias.term.learned, scalars, strict=True):
      found[place] = scalar
    return bias.term.function(query, key, found)

  # Forward mode: the sum over a tile that reverse mode ends with goes along one
  # axis at a time in a kernel.
  scalars = [arrays[place] for place in bias.term.learned]
  grads = []
  for which, scalar in enumerate(scalars):
    one = jnp.ones_like(scalar)
    zeros = [jnp.zeros_like(x) for x in scalars]
    zeros[which] = one
    _, slope = jax.jvp(of, tuple(scalars), tuple(zeros))
    total = jnp.sum(ds * slope, axis=0, keepdims=True)
    total = jnp.sum(total, axis=1, keepdims=True)
    grads.append(total.reshape(1, 1, 1, 1, 1))
  return grads
