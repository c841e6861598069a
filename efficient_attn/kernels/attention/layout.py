"""Arrays of the attention kernels, and what a call is made of.

The op has [B, T, N, H]; the kernels read [B, N, T, H], filled up with zeros to
whole blocks of queries and spans of keys.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.attention.terms import Reader, Term, lay_out
from efficient_attn.kernels.attention.tiles import FULL, Schedule


@dataclasses.dataclass(frozen=True)
class Options:
  """The static part of a call, beside shapes; hashable.

  Attributes:
    schedule: the tiles.
    scale: factor of the logits.
    soft_cap: c in c tanh(logits / c), or None.
    mask: or None.
    bias: or None.
    hides: whether the mask may hide a token from all others.
    vmem: bytes that a kernel may use.
    interpret: see `pl.pallas_call`.
  """

  schedule: Schedule
  scale: float
  soft_cap: float | None
  mask: Term | None
  bias: Term | None
  hides: bool
  vmem: int
  interpret: Any


def by_head(x: jax.Array, length: int) -> jax.Array:
  """[B, T, N, H] to [B, N, length, H], with zeros."""
  x = jnp.swapaxes(x, 1, 2)
  return jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)])


def by_token(x: jax.Array, length: int) -> jax.Array:
  """The inverse, to [B, length, N, H]."""
  return jnp.swapaxes(x[:, :, :length], 1, 2)


def rows_of(x: jax.Array, schedule: Schedule) -> jax.Array:
  """[B, T, N] to rows [B, N, blocks, R], with zeros."""
  x = jnp.swapaxes(x, 1, 2)
  T = schedule.padded[0]
  x = jnp.pad(x, [(0, 0), (0, 0), (0, T - x.shape[2])])
  return x.reshape(*x.shape[:2], -1, schedule.rows)


class Tiles:
  """The inner loop of a program, over the tiles of its block of queries.

  Args:
    options: of the call.
    refs: the scalars: starts, tiles and, unless None, whether run time shows
      something in each tile [#B, #N, tiles].
    mask_refs: of the arrays of the mask.
    bias_refs: of the arrays of the bias.
    place: (b, n, i, p).
    turned: whether keys run along the first axis of a tile.
  """

  def __init__(self, options, refs, mask_refs, bias_refs, place, *, turned):
    self.options, self.place, self.turned = options, place, turned
    self.starts, self.tiles, self.some = refs

    def reader(term, refs):
      if term is None:
        return None
      return Reader(term, refs, place, options.schedule, turned=turned)

    self.mask = reader(options.mask, mask_refs)
    self.bias = reader(options.bias, bias_refs)
    self._positions = Reader(
      Term(None, ()), (), place, options.schedule, turned=turned
    ).positions

  def loop(self, visit) -> None:
    """Calls visit(tile, kind) for every tile that is not empty."""
    s = self.options.schedule
    _, _, i, p = self.place
    at = (p * s.num_blocks + i) * 5
    for kind in s.present:

      def step(t, _, kind=kind):
        if kind == FULL or self.some is None:
          visit(self.tiles[t], kind)
        else:
          pl.when(self._may_admit(t))(lambda: visit(self.tiles[t], kind))

      jax.lax.fori_loop(
        self.starts[at + kind], self.starts[at + kind + 1], step, None
      )

  def _may_admit(self, t):
    b, n, *_ = self.place
    B, N, _ = self.some.shape
    return self.some[b if B > 1 else 0, n if N > 1 else 0, t] != 0

  def admitted(self, tile, rows, cols):
    """Marks the logits of a piece of a tile that count, or None for all."""
    s = self.options.schedule
    found = None
    if self.mask is not None:
      found = self.mask(tile, rows, cols)
    if s.keys % s.cols:
      query, key = self._positions(tile, rows, cols)
      inside = (key < s.keys) & (query == query)
      found = inside if found is None else found & inside
    return found

  def logits(self, q, k, tile, rows, cols, admitted):
    """Logits of a piece, and d(capped) / d(scaled), or None."""
    o = self.options
    s = dot(k, q, NT) if self.turned else dot(q, k, NT)
    s = s * o.scale
    slope = None
    if o.soft_cap is not None:
      capped = jnp.tanh(s / o.soft_cap)
      slope = 1 - capped * capped
      s = capped * o.soft_cap
    if self.bias is not None:
      s = s + self.bias(tile, rows, cols)
    if admitted is not None:
      s = jnp.where(admitted, s, -jnp.inf)
    return s, slope


NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def dot(x, y, dims):
  """A matrix product with float32 sums; float32 operands in several passes."""
  precision = None
  if x.dtype == jnp.float32:
    precision = jax.lax.Precision.HIGHEST
  return jax.lax.dot_general(
    x, y, dims, precision=precision, preferred_element_type=jnp.float32
  )


def call(kernel, options, place, grid, operands, inputs, outputs, scratch, name,
         semantics, cost):  # fmt: skip
  """Calls a kernel.

  Args:
    kernel: takes (scalars, place, mask refs, bias refs, input refs, output
      refs, scratch refs).
    options: of the call.
    place: maps the indices of a program to (b, n, i, p).
    grid: the programs.
    operands: (mask arrays, bias arrays, `some` or None).
    inputs: pairs (array, block specification).
    outputs: triples (shape, dtype, block specification).
    scratch: scratch shapes.
    name: of the kernel, in profiles.
    semantics: of the axes of the grid.
    cost: (multiply-adds, exponentials) of all programs.
  """
  s = options.schedule
  masks, biases, some = operands
  terms = []
  for term, arrays in ((options.mask, masks), (options.bias, biases)):
    terms.append([
      lay_out(x, axes, s, lambda *ids: place(*ids[: len(grid)]))
      for x, axes in zip(arrays, term.axes if term else (), strict=True)
    ])  # fmt: skip
  scalars = [s.array('starts'), s.array('tiles')]
  if some is not None:
    scalars.append(some)
  counts = [len(scalars), len(masks), len(biases), len(inputs), len(outputs)]

  def run(*refs):
    parts, start = [], 0
    for count in counts:
      parts.append(refs[start : start + count])
      start += count
    scalars, *parts = parts
    scalars = (*scalars, None)[:3]
    at = place(*(pl.program_id(a) for a in range(len(grid))))
    kernel(scalars, at, *parts, refs[start:])

  arrays, in_specs = zip(*terms[0], *terms[1], *inputs, strict=True)
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
  moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes))
  return pl.pallas_call(
    run,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=grid,
      in_specs=in_specs,
      out_specs=[spec for *_, spec in outputs],
      scratch_shapes=scratch,
    ),
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=semantics, vmem_limit_bytes=options.vmem
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * cost[0], transcendentals=cost[1], bytes_accessed=moved
    ),
    name=name,
    interpret=options.interpret,
  )(*map(jnp.asarray, scalars), *arrays)
