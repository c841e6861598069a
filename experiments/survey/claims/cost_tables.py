"""The tables of costs in the study guides, cell by cell, counted on the ops."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

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
from experiments.survey.models import (
  cache_bytes,
  forward_flops,
  mixer,
  training_pass,
)

# Long beside tiles, chunks and windows; each varies with the others fixed.
LENGTHS = (16_384, 65_536)
WIDTHS = (1024, 4096)  # of a head: wide beside what a chunk or softmax adds
WINDOWS = (4096, 16_384)  # wide beside tiles
LATENT = (256, 1024)  # d_c
RANKS = (1024, 4096)  # rows of Linformer
LENGTH, WIDTH, WINDOW, STATES = LENGTHS[0], 64, 1024, 16
LONGER = (65_536, 262_144)
N_LOG_N = slope(LONGER, [n * math.log(n) for n in LONGER])
NEAR = 0.15


def pass_over(op: Callable, length: int, width: int) -> cost.Counts:
  """Counts a forward pass of one head."""
  x = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)
  return cost.count(op, x, x, x)


def powers(letter: str, sizes: Sequence[int], counts) -> dict[str, float]:
  """Exponents of operations (time) and of the largest array (memory)."""
  return {
    f'time {letter}': slope(sizes, [c.operations for c in counts]),
    f'memory {letter}': slope(sizes, [c.largest_array for c in counts]),
  }


def windowed(size: int) -> Callable:
  """Causal attention to the last `size` tokens, tile by tile."""
  return functools.partial(
    ops.attention, mask=masks.Window(size - 1, 0), implementation='blockwise'
  )


def gla(query, key, value):
  """A recurrence with a gate for every channel."""
  return ops.linear_attention(query, key, value, log_decay=-key * key)


def deltanet(query, key, value):
  """The delta rule."""
  return ops.delta_rule(query, key, value, key[..., 0])


def kda(query, key, value):
  """The delta rule with a gate for every channel."""
  decay = -key * key
  return ops.delta_rule(query, key, value, key[..., 0], log_decay=decay)


def mamba(query, key, value):
  """A selective state space of 16 states for every channel."""
  rates = -jnp.ones((1, value.shape[-1], STATES))
  read, write = query[:, :, 0, :STATES], key[:, :, 0, :STATES]
  return ops.selective_scan(value, key * key, rates, write, read)


OPS = {
  'standard': functools.partial(
    ops.attention, mask=masks.Causal(), implementation='reference'
  ),
  'flash': functools.partial(
    ops.attention, mask=masks.Causal(), implementation='blockwise'
  ),
  'sparse': windowed(WINDOW),
  'linear': ops.linear_attention,
  'gla': gla,
  'deltanet': deltanet,
  'kda': kda,
  'mamba': mamba,
}
RECURRENT = ('linear', 'gla', 'deltanet', 'kda', 'mamba')


def exponents(op: Callable) -> dict[str, float]:
  """Exponents of a pass in the length and in the width."""
  by_length = [pass_over(op, n, WIDTH) for n in LENGTHS]
  by_width = [pass_over(op, LENGTH, d) for d in WIDTHS]
  return powers('N', LENGTHS, by_length) | powers('d', WIDTHS, by_width)


def by_window() -> dict[str, float]:
  """Exponents of a pass in the keys that a token sees."""
  counts = [pass_over(windowed(k), LONGER[-1], WIDTH) for k in WINDOWS]
  return powers('k', WINDOWS, counts)


def state(op: Callable) -> dict[str, float]:
  """Exponents of what a recurrence keeps of the past."""

  def kept(length, width):
    x = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)
    return cost.array_bytes(jax.eval_shape(op, x, x, x)[1])

  return {
    'state N': slope(LENGTHS, [kept(n, WIDTH) for n in LENGTHS]),
    'state d': slope(WIDTHS, [kept(LENGTH, d) for d in WIDTHS]),
  }


def linformer() -> dict[str, float]:
  """Exponents of a training pass of Linformer in N and in its k rows."""

  def of(length, rank):
    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    options = dict(causal=False, rank=rank, max_len=length)
    return training_pass(mixer('linformer', WIDTH, 1, **options), x)

  by_length = [of(n, RANKS[0]) for n in LENGTHS]
  by_rank = [of(LENGTH, k) for k in RANKS]
  return powers('N', LENGTHS, by_length) | powers('k', RANKS, by_rank)


def reformer() -> dict[str, float]:
  """Exponents of a training pass of Reformer in N.

  There are 2 N / 64 buckets in two factors, as its paper advises.
  """

  def of(length):
    power = (length // 32).bit_length() - 1
    factors = 2 ** (power // 2), 2 ** (power - power // 2)
    module = mixer('reformer', WIDTH, 1, causal=True, num_buckets=factors)
    return training_pass(
      module, jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    )

  return powers('N', LONGER, [of(n) for n in LONGER])


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
  """R40: exponents of every row of the tables."""
  found = {name: exponents(op) for name, op in OPS.items()}
  found['sparse'] |= by_window()
  for name in RECURRENT:
    found[name] |= state(OPS[name])
  return found | dict(
    compact=compact(), linformer=linformer(), reformer=reformer()
  )


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


def hashed_memory(values) -> str:
  """The exponent of the largest array."""
  return f'N^{values["reformer"]["memory N"]:.2f}'


def hashed_bound(values) -> str:
  """A bound holds where less is needed."""
  found = values['reformer']['memory N']
  return HOLDS if found < N_LOG_N + NEAR else FAILS


TABLE = 'S001 Complexity Comparison'
GLANCE = 'S002 Complexity at a Glance'
MASTER = 'S003 Master Comparison Table'
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
    f'in the window k over {WINDOWS} of {LONGER[-1]:,}; of the cache of latent '
    f'attention in N and in d_c over {LATENT}; of what recurrences keep '
    '(state). Of Linformer and Reformer it is a training pass, in the rows k '
    f'over {RANKS}, and in N over {LONGER}, where N log N is N^{N_LOG_N:.2f}.'
  )
  return [page.Table(['', *keys], rows), page.Text(note, note=True)]


R40 = Claim(
  title='Costs in the tables of the study guides',
  tier='a',
  measure=costs,
  parts=table,
  statements=(
    cell(
      'standard',
      'Standard attention takes time O(N^2 d)',
      f'{TABLE}; {MASTER}',
      'O(N²d)',
      {'time N': 2, 'time d': 1},
    ),
    cell(
      'flash',
      'FlashAttention takes the time of standard attention',
      f'{TABLE}; {MASTER}',
      'O(N²d)',
      {'time N': 2, 'time d': 1},
    ),
    cell(
      'sparse',
      'Sparse attention takes time O(N k)',
      f'{TABLE}; {GLANCE}; {MASTER}',
      'O(N·k), O(n·w), O(nwd)',
      {'time N': 1, 'time k': 1},
    ),
    cell(
      'sparse',
      'Sparse attention takes memory O(N k)',
      f'{TABLE}; {GLANCE}; {MASTER}',
      'O(N·k), O(n·w), O(nw)',
      {'memory N': 1, 'memory k': 1},
      instead={'memory N': 1, 'memory k': 0},
      why='it is a bound: in tiles a pass holds O(N), whatever k is',
    ),
    cell(
      'linear',
      'Linear attention takes time O(N d^2)',
      f'{TABLE}; {MASTER}',
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
      f'{GLANCE}; {MASTER}',
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
    cell(
      'linear',
      'Linear attention takes memory O(n d)',
      MASTER,
      'O(nd)',
      {'memory N': 1, 'memory d': 1},
    ),
    *(
      cell(
        name,
        f'{title} takes time O(n d^2) and memory O(n d)',
        MASTER,
        'O(nd²), O(nd)',
        {'time N': 1, 'time d': 2, 'memory N': 1, 'memory d': 1},
      )
      for name, title in (
        ('gla', 'GLA'),
        ('deltanet', 'DeltaNet'),
        ('kda', 'KDA'),
      )
    ),
    cell(
      'mamba',
      'Mamba takes time O(n d) and memory O(d)',
      MASTER,
      'O(nd), O(d)',
      {'time N': 1, 'time d': 1, 'memory N': 0, 'memory d': 1},
      instead={'time N': 1, 'time d': 1, 'state N': 0, 'state d': 1},
      why=STATE,
    ),
    cell(
      'mamba',
      'Mamba takes time O(n), with a state of O(1) per step',
      'S003 State Space Models (Mamba)',
      'O(n) time, O(1) state per step',
      {'time N': 1, 'state N': 0},
    ),
    cell(
      'linformer',
      'Linformer takes time O(n k d) and memory O(n k)',
      MASTER,
      'O(nkd), O(nk)',
      {'time N': 1, 'time k': 1, 'memory N': 1, 'memory k': 1},
    ),
    cell(
      'reformer',
      'LSH attention takes time O(n log n)',
      MASTER,
      'O(n log n)',
      {'time N': N_LOG_N},
    ),
    Statement(
      says='LSH attention takes memory O(n log n) at most',
      source=MASTER,
      printed='O(n log n)',
      measured=hashed_memory,
      judge=hashed_bound,
      rule=f'no more than {NEAR} above the exponent of n log n, {N_LOG_N:.2f}',
    ),
  ),
)

COST_TABLES = {'R40': R40}
