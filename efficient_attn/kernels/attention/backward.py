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
from efficient_attn.kernels.attention.terms import LANES, column, row
from efficient_attn.kernels.attention.tiles import FULL


@functools.partial(jax.jit, static_argnames='options')
def backward(
  query,
  key,
  value,
  out,
  d_out,
  top,
  share,
  more,
  operands,
  *,
  options: Options,
):
  """The cotangents of query, key, value, and of what is learned of the bias.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].
    out: [B, T, N, V].
    d_out: [B, T, N, V].
    top: the largest logits, [B, T, N].
    share: 1 / l, 0 for a row without keys, [B, T, N].
    more: l dl, [B, T, N].
    operands: see `forward`.
    options: what is static.
  """
  s, bias = options.schedule, options.bias
  stats = jnp.stack([rows_of(x, s) for x in (top, share, more)], axis=3)
  T, S = s.padded
  arrays = [
    by_head(query, T), by_head(out, T), by_head(d_out, T), by_head(key, S),
    by_head(value, S), stats,
  ]  # fmt: skip
  run = functools.partial(_call, arrays, operands, options)
  if s.num_spans == 1:
    d_q, d_k, d_v, *found = run(('query', 'key'))
  else:
    d_q, *found = run(('query',))
    d_k, d_v, *more = run(('key',))
    found += more
  order = [*_learned(options, ('query',)), *_learned(options, ('key',))]
  found = dict(zip(order, found, strict=True))
  learned = []
  for which in bias.learned if bias else ():
    x, axis = found[which], _axis(bias, which)
    x = x.reshape(*x.shape[:2], -1)
    if axis:
      learned.append(x[..., : {'T': s.length, 'S': s.keys}[axis]])
    else:
      learned.append(jnp.sum(x[..., ::LANES], axis=2))
  lengths = query.shape[1], key.shape[1], key.shape[1]
  return *map(by_token, (d_q, d_k, d_v), lengths), learned


def _axis(bias, which):
  """T or S, or nothing, whichever an array of the bias has."""
  return ''.join(a for a in bias.axes[which] if a in 'TS')


def _learned(options, wanted):
  """The arrays whose gradients a kernel makes: of rows, then of others."""
  bias = options.bias
  whichs = bias.learned if bias else ()
  rows = [which for which in whichs if _axis(bias, which) == 'T']
  others = [which for which in whichs if which not in rows]
  return rows * ('query' in wanted) + others * ('key' in wanted)


def _call(arrays, operands, options, wanted):
  q, _, _, k, v, _ = arrays
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
  specs = [queries(H), queries(V), queries(V), keys(H), keys(V), rows]
  outputs, scratch = [], [pltpu.VMEM((1, R), jnp.float32)]
  if 'query' in wanted:
    outputs.append((q.shape, q.dtype, queries(H)))
    scratch.append(pltpu.VMEM((R, H), jnp.float32))
  if 'key' in wanted:
    outputs += [(x.shape, x.dtype, keys(x.shape[-1])) for x in (k, v)]
    scratch += [pltpu.VMEM((span * C, width), jnp.float32) for width in (H, V)]
  learned = _learned(options, wanted)
  for which in learned:
    # Blocks, how many of them a program has, and what is in each.
    shape, many, index = {
      'T': ((s.num_blocks, 1, R), 1, lambda b, kv, n, i, p: (b, n, i, 0, 0)),
      'S': (
        (s.num_spans * span, 1, C),
        span,
        lambda b, kv, n, i, p: (b, n, p, 0, 0),
      ),
      '': (
        (s.num_spans, 1, LANES), 1, lambda b, kv, n, i, p: (b, n, p, 0, 0),
      ),
    }[_axis(options.bias, which)]  # fmt: skip
    outputs.append((
      (B, N, *shape), jnp.float32, spec((1, 1, many, *shape[1:]), index),
    ))  # fmt: skip
    if _axis(options.bias, which) == 'S':
      scratch.append(pltpu.VMEM((span * C, LANES), jnp.float32))
  tiles = len(s.tiles) // 4 * R * C * B * N
  return call(
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


def _backward(
  scalars, place, masks, biases, inputs, outputs, scratch,
  *, options, wanted, grid,
):  # fmt: skip
  q_ref, out_ref, do_ref, k_ref, v_ref, stats_ref = inputs
  delta_ref, *scratch = scratch
  outputs = list(outputs)
  dq_out, dq_ref = (
    (outputs.pop(0), scratch.pop(0)) if 'query' in wanted else (None, None)
  )
  dk_out = dv_out = dk_ref = dv_ref = None
  if 'key' in wanted:
    dk_out, dv_out, *outputs = outputs
    dk_ref, dv_ref, *scratch = scratch
  learned = {
    which: (_axis(options.bias, which), ref)
    for which, ref in zip(_learned(options, wanted), outputs, strict=True)
  }
  # Of an array of keys, sums of lanes, which wait until the end.
  by_key = {
    which: scratch.pop(0) for which, (axis, _) in learned.items() if axis == 'S'
  }
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
      each_tile(functools.partial(_fill, refs=(dk_ref, dv_ref)))

  @pl.when((p == 0) | ('key' in wanted))
  def _():
    product = out_ref[0, 0].astype(jnp.float32) * do_ref[0, 0]
    delta = row(jnp.sum(product, axis=1, keepdims=True))
    delta_ref[...] = delta - stats_ref[0, 0, 0, 2:]

  if 'query' in wanted:

    @pl.when((p == 0) | ('key' in wanted))
    def _():
      dq_ref[...] = jnp.zeros_like(dq_ref)

  for axis, ref in learned.values():

    @pl.when(True if axis == 'T' and 'key' in wanted else
             p == 0 if axis == 'T' else i == 0)  # fmt: skip
    def _(ref=ref):
      ref[...] = jnp.zeros_like(ref)

  for ref in by_key.values():

    @pl.when(i == 0)
    def _(ref=ref):
      each_tile(functools.partial(_fill, refs=(ref,)))

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
      top, share = (stats_ref[0, 0, 0, r : r + 1, rows] for r in range(2))
      # Not above 0, though products round otherwise than in the forward pass.
      p = jnp.exp(jnp.minimum(s - top, 0)) * share
      ds = p * (dp - delta_ref[:, rows])
      for which, (axis, ref) in learned.items():
        grad = ds * _slope(tiles.bias, which, tile, rows, cols)
        if axis == 'S':
          by_key[which][pl.ds(tile * C + cols.start, grad.shape[0])] += sum(
            grad[:, x : x + LANES] for x in range(0, grad.shape[1], LANES)
          )
          continue
        grad = jnp.sum(grad, axis=0, keepdims=True)
        if axis == 'T':
          ref[0, 0, 0, :, rows] += grad
        else:
          total = jnp.sum(grad, axis=1, keepdims=True)
          ref[...] += total.reshape(1, 1, 1, 1, 1)
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

  for which, ref in by_key.items():

    @pl.when(i == grid[4] - 1)
    def _(which=which, ref=ref):
      for tile in range(schedule.span):
        total = jnp.sum(ref[tile * C : (tile + 1) * C], axis=1, keepdims=True)
        learned[which][1][0, 0, tile] = row(total)


def _fill(at, refs):
  for ref in refs:
    ref[at] = jnp.zeros_like(ref[at])


def _slope(bias, which, tile, rows, cols):
  """The derivative of a tile by one of its arrays.

  In forward mode: the sum over a tile that reverse mode ends with goes along
  one axis at a time in a kernel.
  """
  query, key = bias.positions(tile, rows, cols)
  arrays = bias.arrays(tile, rows, cols)

  def of(array):
    found = list(arrays)
    found[which] = array
    return bias.term.function(query, key, found)

  one = arrays[which]
  return jax.jvp(of, (one,), (jnp.ones_like(one),))[1]
