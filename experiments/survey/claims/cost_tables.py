"""The tables of costs in two study guides, cell by cell, counted on the ops."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from efficient_attn import ops
from efficient_attn.models import cost
from efficient_attn.ops import masks
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  Statement,
)
from experiments.survey.models import cache_bytes, forward_flops, mixer

# Long beside tiles, chunks and windows; each varies with the others fixed.
LENGTHS = (16_384, 65_536)
WIDTHS = (256, 1024)  # of a head: wide beside what a chunk or softmax adds
WINDOWS = (4096, 16_384)  # wide beside tiles, of
LONG = 262_144  # tokens
LATENT = (256, 1024)  # d_c
LENGTH, WIDTH, WINDOW = LENGTHS[0], 64, 1024
NEAR = 0.15


def pass_over(op: Callable, length: int, width: int) -> cost.Counts:
  """Counts a forward pass of one head."""
  x = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)
  return cost.count(op, x, x, x)


def windowed(size: int) -> Callable:
  """Causal attention to the last `size` tokens, tile by tile."""
  return functools.partial(
    ops.attention, mask=masks.Window(size - 1, 0), implementation='blockwise'
  )


OPS = {
  'standard': functools.partial(
    ops.attention, mask=masks.Causal(), implementation='reference'
  ),
  'flash': functools.partial(
    ops.attention, mask=masks.Causal(), implementation='blockwise'
  ),
  'sparse': windowed(WINDOW),
  'linear': ops.linear_attention,
}


def exponents(op: Callable) -> dict[str, float]:
  """Exponents of operations (time) and of the largest array (memory)."""
  by_length = [pass_over(op, n, WIDTH) for n in LENGTHS]
  by_width = [pass_over(op, LENGTH, d) for d in WIDTHS]
  return {
    'time N': slope(LENGTHS, [c.operations for c in by_length]),
    'memory N': slope(LENGTHS, [c.largest_array for c in by_length]),
    'time d': slope(WIDTHS, [c.operations for c in by_width]),
    'memory d': slope(WIDTHS, [c.largest_array for c in by_width]),
  }


def by_window() -> dict[str, float]:
  """Exponents of a pass in the keys that a token sees."""
  counts = [pass_over(windowed(k), LONG, WIDTH) for k in WINDOWS]
  return {
    'time k': slope(WINDOWS, [c.operations for c in counts]),
    'memory k': slope(WINDOWS, [c.largest_array for c in counts]),
  }


def state() -> dict[str, float]:
  """Exponents of what linear attention keeps of the past."""

  def kept(length, width):
    x = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)
    return cost.array_bytes(jax.eval_shape(ops.linear_attention, x, x, x)[1])

  return {
    'state N': slope(LENGTHS, [kept(n, WIDTH) for n in LENGTHS]),
    'state d': slope(WIDTHS, [kept(LENGTH, d) for d in WIDTHS]),
  }


def compact() -> dict[str, float]:
  """Exponents of latent attention: its products, and its cache."""

  def latent(rank):
    return mixer('mla', 512, 4, kv_rank=rank, rope_dim=16)

  def flops(length):
    x = jax.ShapeDtypeStruct((1, length, 512), jnp.float32)
    return forward_flops(latent(LATENT[0]), x)

  one = [cache_bytes(latent(LATENT[0]), n) for n in LENGTHS]
  return {
    'time N': slope(LENGTHS, [flops(n) for n in LENGTHS]),
    'memory N': slope(LENGTHS, one),
    'memory d_c': slope(
      LATENT, [cache_bytes(latent(r), LENGTH) for r in LATENT]
    ),
  }


def costs() -> dict:
  """R40: exponents of every row of both tables."""
  found = {name: exponents(op) for name, op in OPS.items()}
  found['sparse'] |= by_window()
  found['linear'] |= state()
  return found | dict(compact=compact())


def near(row: Mapping, wanted: Mapping[str, float]) -> bool:
  """Whether counted exponents are those of a printed cost."""
  return all(abs(row[key] - power) < NEAR for key, power in wanted.items())


def cell(
  row: str,
  says: str,
  source: str,
  printed: str,
  wanted: Mapping[str, float],
  *,
  instead: Mapping[str, float] | None = None,
  why: str = '',
) -> Statement:
  """A printed cost; `instead` is what the print means if not a pass, `why`."""

  def measured(values):
    keys = wanted | (instead or {})
    powers = {key: f'{values[row][key]:.2f}' for key in keys}
    return ', '.join(f'{key}^{power}' for key, power in powers.items())

  def judge(values):
    if near(values[row], wanted):
      return HOLDS
    return RESTATED if instead and near(values[row], instead) else FAILS

  return Statement(
    says=says,
    source=source,
    printed=printed,
    measured=measured,
    judge=judge,
    rule=f'every exponent within {NEAR}' + (why and f'; restated if {why}'),
  )


TABLE = 'S001 Complexity Comparison'
GLANCE = 'S002 Complexity at a Glance'
STATE = 'only what is kept of the past has it, and not a pass over N tokens'


def table(values) -> list:
  """All counted exponents."""
  keys = dict.fromkeys(key for row in values.values() for key in row)
  rows = [
    [name, *(f'{row[key]:.2f}' if key in row else '' for key in keys)]
    for name, row in values.items()
  ]
  note = (
    'Exponents of operations (time) and of the largest array (memory) of a '
    f'forward pass: in N over {LENGTHS}, in the head width d over {WIDTHS}, '
    f'in the window k over {WINDOWS} of {LONG:,}; of the cache of latent '
    f'attention in N and in d_c over {LATENT}; of what linear attention keeps '
    '(state).'
  )
  return [page.Table(['', *keys], rows), page.Text(note, note=True)]


R40 = Claim(
  title='Costs of standard, tiled, sparse, linear and compact attention',
  tier='a',
  measure=costs,
  parts=table,
  statements=(
    cell(
      'standard',
      'Standard attention takes time O(N^2 d)',
      TABLE,
      'O(N²d)',
      {'time N': 2, 'time d': 1},
    ),
    cell(
      'flash',
      'FlashAttention takes the time of standard attention',
      TABLE,
      'O(N²d)',
      {'time N': 2, 'time d': 1},
    ),
    cell(
      'sparse',
      'Sparse attention takes time O(N k)',
      f'{TABLE}; {GLANCE}',
      'O(N·k), O(n·w)',
      {'time N': 1, 'time k': 1},
    ),
    cell(
      'sparse',
      'Sparse attention takes memory O(N k)',
      f'{TABLE}; {GLANCE}',
      'O(N·k), O(n·w)',
      {'memory N': 1, 'memory k': 1},
      instead={'memory N': 1, 'memory k': 0},
      why='it is a bound: in tiles a pass holds O(N), whatever k is',
    ),
    cell(
      'linear',
      'Linear attention takes time O(N d^2)',
      TABLE,
      'O(Nd²)',
      {'time N': 1, 'time d': 2},
    ),
    cell(
      'linear',
      'Linear attention takes memory O(d^2)',
      TABLE,
      'O(d²)',
      {'memory N': 0, 'memory d': 2},
      instead={'state N': 0, 'state d': 2},
      why=STATE,
    ),
    cell(
      'linear',
      'Linear attention takes time and memory O(n)',
      GLANCE,
      'O(n), O(n)',
      {'time N': 1, 'memory N': 1},
    ),
    cell(
      'standard',
      'Dense attention takes time and memory O(n^2)',
      GLANCE,
      'O(n²), O(n²)',
      {'time N': 2, 'memory N': 2},
    ),
    cell(
      'compact',
      'Compact attention takes time O(N^2)',
      TABLE,
      'O(N²d)',
      {'time N': 2},
    ),
    cell(
      'compact',
      'Compact attention stores O(N d_c)',
      TABLE,
      'O(N·d_c)',
      {'memory N': 1, 'memory d_c': 1},
    ),
  ),
)

COST_TABLES = {'R40': R40}
