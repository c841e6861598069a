"""The forward pass.

For the tiles j of a block of queries, with the statistics m and l apart,

    m' = max(m, max_j s_j)     p_j = exp(s_j - m')     a = exp(m - m')
    l' = a l + sum p_j         o' = a o + p_j v_j

and out = o / l at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.attention.layout import (
  NN,
  Options,
  Tiles,
  by_head,
  by_token,
  call,
  dot,
)
from efficient_attn.kernels.attention.terms import LANES, column
from efficient_attn.kernels.attention.tiles import FULL


@functools.partial(jax.jit, static_argnames='options')
def forward(query, key, value, sinks, operands, *, options: Options):
  """The output and the denominators.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].
    sinks: [N] or None.
    operands: (arrays of the mask, arrays of the bias, `some` or None), see
      `layout.call`.
    options: what is static.

  Returns:
    out [B, T, N, V] in the query's dtype, and the largest logits and sums of
    weights [B, T, N], float32.
  """
  B, _, N, H = query.shape
  K, V = value.shape[2:]
  s = options.schedule
  R = s.rows
  T, S = s.padded
  group = N // K

  def place(b, n, i, p):
    return b, n, i, p

  def keys(width):
    return pl.BlockSpec(
      (1, 1, s.span * s.cols, width),
      lambda b, n, i, p, *_: (b, jax.lax.div(n, n.dtype.type(group)), p, 0),
    )

  inputs = [
    (
      by_head(query, T),
      pl.BlockSpec((1, 1, R, H), lambda b, n, i, p, *_: (b, n, i, 0)),
    ),
    (by_head(key, S), keys(H)),
    (by_head(value, S), keys(V)),
  ]
  if sinks is not None:
    inputs.append(
      (sinks.astype(jnp.float32), pl.BlockSpec(memory_space=pltpu.SMEM))
    )
  tiles = len(s.tiles) // 4 * R * s.cols * B * N
  out, stats = call(
    functools.partial(_forward, options=options),
    options,
    place,
    (B, N, s.num_blocks, s.num_spans),
    operands,
    inputs,
    [
      (
        (B, N, T, V),
        query.dtype,
        pl.BlockSpec((1, 1, R, V), lambda b, n, i, p, *_: (b, n, i, 0)),
      ),
      (
        (B, N, s.num_blocks, 2, R),
        jnp.float32,
        pl.BlockSpec((1, 1, 1, 2, R), lambda b, n, i, p, *_: (b, n, i, 0, 0)),
      ),
    ],
    [
      pltpu.VMEM((R, LANES), jnp.float32),
      pltpu.VMEM((R, LANES), jnp.float32),
      pltpu.VMEM((R, V), jnp.float32),
    ],
    'attention_forward',
    ('parallel', 'parallel', 'arbitrary', 'arbitrary'),
    (tiles * (H + V), tiles),
  )
  stats = stats.transpose(3, 0, 2, 4, 1).reshape(2, B, T, N)
  length = query.shape[1]
  return by_token(out, length), stats[0, :, :length], stats[1, :, :length]


def _forward(
  scalars, place, masks, biases, inputs, outputs, scratch, *, options
):
  q_ref, k_ref, v_ref, *sinks = inputs
  out_ref, stats_ref = outputs
  m_ref, l_ref, o_ref = scratch
  C = options.schedule.cols
  _, n, _, p = place
  first = sinks[0][n] if sinks else -jnp.inf

  @pl.when(p == 0)
  def _():
    m_ref[...] = jnp.full_like(m_ref, first)
    l_ref[...] = jnp.zeros_like(l_ref)
    o_ref[...] = jnp.zeros_like(o_ref)

  tiles = Tiles(options, scalars, masks, biases, place, turned=False)

  def visit(tile, kind):
    # One step of all pieces after another, so that their chains interleave.
    pieces = options.schedule.pieces(kind)
    logits, values = [], []
    for rows, cols in pieces:
      at = pl.ds(
        pl.multiple_of(tile * C + cols.start, LANES), cols.stop - cols.start
      )
      k, v = k_ref[0, 0, at], v_ref[0, 0, at]
      admitted = None if kind == FULL else tiles.admitted(tile, rows, cols)
      if options.hides and admitted is not None:
        seen = jnp.max(admitted.astype(jnp.float32), axis=0, keepdims=True)
        v = jnp.where(column(seen) > 0, v, 0)
      logits.append(
        tiles.logits(q_ref[0, 0, rows], k, tile, rows, cols, admitted)[0]
      )
      values.append(v)
    weights = []
    for (rows, _), s in zip(pieces, logits, strict=True):
      m = m_ref[rows]
      top = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
      anchor = top if kind == FULL else jnp.where(top == -jnp.inf, 0, top)
      p = jnp.exp(s - across(anchor, s.shape[1]))
      weights.append((top, p, jnp.exp(m - anchor)))
    for (rows, _), (top, p, decay), v in zip(
      pieces, weights, values, strict=True
    ):
      m_ref[rows] = top
      # Sums of lanes wait until the end.
      l_ref[rows] = l_ref[rows] * decay + sum(
        p[:, x : x + LANES] for x in range(0, p.shape[1], LANES)
      )
      o_ref[rows] = o_ref[rows] * across(decay, o_ref.shape[1]) + dot(
        p.astype(v.dtype), v, NN
      )

  tiles.loop(visit)

  @pl.when(p == options.schedule.num_spans - 1)
  def _():
    m, l = m_ref[...], jnp.sum(l_ref[...], axis=1, keepdims=True)
    if sinks:
      l = l + jnp.exp(first - m)
    share = across(inverse(jnp.where(l == 0, 1, l)), o_ref.shape[1])
    out_ref[0, 0] = (o_ref[...] * share).astype(out_ref.dtype)
    m = jnp.where(l == 0, 0, m)
    lane = jax.lax.broadcasted_iota(jnp.int32, m.shape, 1)
    both = jnp.where(lane < LANES // 2, m, l).T
    stats_ref[0, 0, 0, :1] = both[:1]
    stats_ref[0, 0, 0, 1:] = both[LANES // 2 : LANES // 2 + 1]


def inverse(x: jax.Array) -> jax.Array:
  """1 / x for x >= 1: two steps of Newton cost less than a division."""
  # It stands with the TPU's own operations since jax 0.11.
  module = pltpu if hasattr(pltpu, 'reciprocal') else pl
  found = module.reciprocal(x, approx=True)
  found = found * (2 - x * found)
  return found * (2 - x * found)


def across(x: jax.Array, width: int) -> jax.Array:
  """[R, 1] or [R, LANES] of equal lanes to [R, width]."""
  if x.shape[1] == width:
    return x
  if x.shape[1] == LANES and width % LANES == 0:
    return jnp.tile(x, (1, width // LANES))
  return jnp.broadcast_to(x[:, :1], (x.shape[0], width))
