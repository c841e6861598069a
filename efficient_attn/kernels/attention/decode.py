"""Attention of few queries, as a decoder's, that reads a cache once.

A cache has the rows of all its heads together, [S, K, H] as [S K, H]. Rows of
a product are (kv head, query, head of its group), columns (key, kv head) as
they stand in memory, so that no key is moved; of K columns a row admits its
own. The others cost less than the memory takes: a product takes as long as its
keys need to get into the unit, whatever the number of rows.

The keys of a sequence come in pieces, pages of a pool or parts of one array,
several a program, with the statistics of `forward` kept in between. Pieces
that admit nothing are not read.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.attention.forward import across, inverse
from efficient_attn.kernels.attention.layout import NN, NT, dot
from efficient_attn.kernels.attention.terms import LANES, column

SUBLANES = 8
# Stands for -inf where a product copies numbers, which must be finite.
HIDDEN = -3e38
NOTHING, SOME, ALL = range(3)


@dataclasses.dataclass(frozen=True)
class Pieces:
  """The static part of a call, beside shapes; hashable.

  Attributes:
    keys: of a piece.
    tile: keys of a piece that are in one product; all where `count` > 1.
    count: pieces of a program; `tile` * `count` is a multiple of 128.
    paged: whether a piece is a page of a pool.
    scale: factor of the logits.
    soft_cap: c in c tanh(logits / c), or None.
    vmem: bytes that the kernel may use.
    interpret: see `pl.pallas_call`.
  """

  keys: int
  tile: int
  count: int
  paged: bool
  scale: float
  soft_cap: float | None
  vmem: int
  interpret: Any


@functools.partial(jax.jit, static_argnames='pieces')
def decode(query, key, value, added, sinks, kinds, pages, *, pieces: Pieces):
  """The output and the denominators.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H], or a pool of pages [P, page, K, H].
    value: [B, S, K, V], or a pool of pages [P, page, K, V].
    added: what is added to the logits, `HIDDEN` where a key is not admitted,
      [#B, #N, T, keys of all pieces].
    sinks: [N] or None.
    kinds: of the pieces, `NOTHING`, `SOME` or `ALL` of whose keys any query
      sees, int32 [B, pieces].
    pages: the page of each piece, int32 [B, pieces], or None.
    pieces: what is static.

  Returns:
    out [B, T, N, V] in the query's dtype, and the largest logits and sums of
    weights [B, T, N], float32.
  """
  B, T, N, H = query.shape
  K, V = value.shape[2:]
  group = N // K
  M = -(-T * N // SUBLANES) * SUBLANES

  def by_row(x, filling):
    """[#B, T, N, ...] to [#B, M, ...]."""
    x = jnp.moveaxis(x.reshape(len(x), T, K, group, -1), 1, 2)
    x = x.reshape(len(x), T * N, -1)
    pad = [(0, 0), (0, M - T * N), (0, 0)]
    return jnp.pad(x, pad, constant_values=filling)

  if added.shape[1] > 1 or T > 1:
    shape = len(added), N, *added.shape[2:]
    added = jnp.swapaxes(jnp.broadcast_to(added, shape), 1, 2)
    added = by_row(added, HIDDEN)
  else:
    added = added[:, 0]
  kinds = kinds.reshape(B, -1, pieces.count)
  programs = kinds.shape[1]
  # A piece that is not read has that of the program before it.
  places = jnp.where(kinds != NOTHING, jnp.arange(programs)[:, None], 0)
  places = jax.lax.cummax(places, axis=1)
  if pages is not None:
    places = jnp.take_along_axis(pages.reshape(kinds.shape), places, axis=1)
  scalars = [x.reshape(B, -1).astype(jnp.int32) for x in (kinds, places)]

  def kept(x):
    block = x.shape[-2:]
    return pl.BlockSpec(
      (None, *block), lambda b, j, *_: (b if len(x) > 1 else 0, 0, 0)
    )

  def of_piece(x, i):
    def index(b, j, kinds, places):
      place = places[b, j * pieces.count + i]
      return (place, 0, 0) if pieces.paged else (b, place, 0)

    return pl.BlockSpec((None, pieces.keys * K, x.shape[2]), index)

  rows = by_row(query, 0)
  inputs = [(rows, kept(rows))]
  if K > 1:
    # One number for each column of a key, of its number.
    spread = jnp.repeat(jnp.eye(LANES, dtype=added.dtype), K, axis=1)[None]
    inputs.append((spread, kept(spread)))
  width = pieces.count * pieces.keys
  block = None, added.shape[1], width
  inputs.append((
    added,
    pl.BlockSpec(block, lambda b, j, *_: (b if len(added) > 1 else 0, 0, j)),
  ))  # fmt: skip
  if sinks is not None:
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), (1, T, N))
    sinks = jnp.broadcast_to(by_row(sinks, 0), (1, M, LANES))
    inputs.append((sinks, kept(sinks)))
  for x in (key, value):
    x = x.reshape(len(x), -1, x.shape[3])
    inputs += [(x, of_piece(x, i)) for i in range(pieces.count)]
  arrays, specs = zip(*inputs, strict=True)
  outputs = [
    jax.ShapeDtypeStruct((B, M, V), query.dtype),
    jax.ShapeDtypeStruct((B, M, LANES), jnp.float32),
  ]
  keys = B * programs * width
  sunk = sinks is not None

  def run(kinds, places, *refs):
    refs = list(refs)
    _decode(
      kinds,
      refs.pop(0),
      refs.pop(0) if K > 1 else None,
      refs.pop(0),
      refs.pop(0) if sunk else None,
      refs[: pieces.count],
      refs[pieces.count : -5],
      *refs[-5:],
      pieces=pieces,
      heads=K,
      rows=T * group,
    )

  statistics = [pltpu.VMEM((M, LANES), jnp.float32) for _ in range(2)]
  out, stats = pl.pallas_call(
    run,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(B, programs),
      in_specs=specs,
      out_specs=[
        pl.BlockSpec((None, *x.shape[1:]), lambda b, j, *_: (b, 0, 0))
        for x in outputs
      ],
      scratch_shapes=[*statistics, pltpu.VMEM((M, V), jnp.float32)],
    ),
    out_shape=outputs,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=pieces.vmem,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * keys * T * N * (H + V),
      transcendentals=keys * T * N,
      bytes_accessed=keys * K * (H + V) * key.dtype.itemsize,
    ),
    name='attention_decode',
    interpret=pieces.interpret,
  )(*scalars, *arrays)

  def by_query(x):
    x = x[:, : T * N].reshape(B, K, T, group, -1)
    return jnp.moveaxis(x, 1, 2).reshape(B, T, N, -1)

  top, total = (by_query(stats[..., [x]])[..., 0] for x in (0, LANES // 2))
  return by_query(out), top, total


def _decode(
  kinds, q_ref, spread_ref, added_ref, sinks_ref, k_refs, v_refs,
  out_ref, stats_ref, m_ref, l_ref, o_ref, *, pieces, heads, rows,
):  # fmt: skip
  b, j = pl.program_id(0), pl.program_id(1)
  count, tile = pieces.count, pieces.tile

  @pl.when(j == 0)
  def _():
    m_ref[...] = (
      jnp.full_like(m_ref, -jnp.inf) if sinks_ref is None else sinks_ref[...]
    )
    l_ref[...] = jnp.zeros_like(l_ref)
    o_ref[...] = jnp.zeros_like(o_ref)

  def visit(x, hides):
    at = pl.ds(x * tile * heads, tile * heads)
    k, v = (
      jnp.concatenate([ref[at] for ref in refs], axis=0)
      for refs in (k_refs, v_refs)
    )
    start = pl.multiple_of(x * tile * count, LANES)
    added = added_ref[:, pl.ds(start, tile * count)]
    s = dot(q_ref[...], k, NT) * pieces.scale
    if pieces.soft_cap is not None:
      s = pieces.soft_cap * jnp.tanh(s / pieces.soft_cap)
    s, seen = _admitted(s, added, spread_ref, heads, rows)
    if hides:
      v = jnp.where(column(seen) > 0, v, 0)
    m = m_ref[...]
    top = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
    anchor = jnp.where(top == -jnp.inf, 0, top)
    p = jnp.exp(s - across(anchor, s.shape[1]))
    decay = jnp.exp(m - anchor)
    m_ref[...] = top
    l_ref[...] = l_ref[...] * decay + sum(
      p[:, x : x + LANES] for x in range(0, p.shape[1], LANES)
    )
    o_ref[...] = o_ref[...] * across(decay, o_ref.shape[1]) + dot(
      p.astype(v.dtype), v, NN
    )

  seen = [kinds[b, j * count + i] for i in range(count)]
  some = functools.reduce(jnp.maximum, seen) != NOTHING
  every = functools.reduce(jnp.minimum, seen) == ALL

  def step(x, _):
    # A key that no query sees may have any value, and what stands behind the
    # last one has: it takes twice as long to leave those out.
    for hides in (False, True):
      pl.when(some & (every != hides))(functools.partial(visit, x, hides=hides))

  jax.lax.fori_loop(0, pieces.keys // tile, step, None)

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    m, l = m_ref[...], jnp.sum(l_ref[...], axis=1, keepdims=True)
    l = jnp.broadcast_to(l, m.shape)
    if sinks_ref is not None:
      l = l + jnp.exp(sinks_ref[...] - m)
    share = across(inverse(jnp.where(l == 0, 1, l)), o_ref.shape[1])
    out_ref[...] = (o_ref[...] * share).astype(out_ref.dtype)
    m = jnp.where(l == 0, 0, m)
    lane = jax.lax.broadcasted_iota(jnp.int32, m.shape, 1)
    stats_ref[...] = jnp.where(lane < LANES // 2, m, l)


def _admitted(s, added, spread_ref, heads, rows):
  """The logits that count, others -inf, and the columns that any row sees."""
  if heads > 1:
    added = jnp.broadcast_to(added, (max(len(added), SUBLANES), added.shape[1]))
    added = jnp.concatenate(
      [
        dot(added[:, x : x + LANES], spread_ref[...], NN)
        for x in range(0, added.shape[1], LANES)
      ],
      axis=1,
    )
  if len(added) != len(s):
    added = jnp.broadcast_to(added[:1], s.shape)
  added = added.astype(jnp.float32)
  admitted = added > HIDDEN / 2
  if heads > 1:
    row = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    col = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
    own = jax.lax.div(row, rows) == jax.lax.rem(col, heads)
    admitted = admitted & own
  seen = jnp.max(admitted.astype(jnp.float32), axis=0, keepdims=True)
  return jnp.where(admitted, s + added, -jnp.inf), seen
