"""Exponents of every mixer in length, counted on its jaxpr and its cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers import MIXERS, mixer_options
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  Claim,
  Statement,
)
from experiments.survey.models import cache_bytes, mixer, training_pass
from experiments.survey.sources import OURS

D, HEADS = 64, 4
LENGTHS = (16_384, 65_536)
WIDTHS = (D, 256)  # with the same number of heads
CHUNKS = (64, 256)
# Rows that the tables print with O(N C d + N d^2).
CHUNKED = (
  'lightning',
  'retention',
  'gla',
  'rwkv5',
  'gsa',
  'rodimus',
  'deltanet',
  'gated_deltanet',
)


def build(name: str, length: int, width: int = D, **changes) -> nnx.Module:
  """The mixer of a row with its own options, for sequences of `length`."""
  limits = dict(
    max_len=length,
    max_length=length,
    max_blocks=length // 64,
    num_levels=length.bit_length(),
  )
  options = {k: v for k, v in limits.items() if k in mixer_options(name)}
  options |= changes
  return mixer(name, width, HEADS, causal=MIXERS[name].causal, **options)


def sequence(length: int, width: int = D) -> jax.ShapeDtypeStruct:
  """What a row reads, [1, length, width]."""
  return jax.ShapeDtypeStruct((1, length, width), jnp.float32)


def operations(name: str, width: int, **changes) -> float:
  """Operations of a training pass over the first of LENGTHS."""
  module = build(name, LENGTHS[0], width, **changes)
  return training_pass(module, sequence(LENGTHS[0], width)).operations


def exponents(name: str) -> dict:
  """Exponents of one row.

  Of a training pass the arithmetic (time) and the largest array (memory), and
  the decode state, in the length; the arithmetic in the width and, where the
  row has it, in the chunk size.
  """
  causal = MIXERS[name].causal
  modules = {n: build(name, n) for n in LENGTHS}
  counts = [training_pass(m, sequence(n)) for n, m in modules.items()]
  found = dict(
    time=slope(LENGTHS, [c.operations for c in counts]),
    memory=slope(LENGTHS, [c.largest_array for c in counts]),
    stated_time=MIXERS[name].time,
    stated_state=MIXERS[name].state if causal else '',
  )
  if causal:
    sizes = [cache_bytes(module, n) for n, module in modules.items()]
    found['state'] = slope(LENGTHS, sizes) if min(sizes) else 0.0
    found['state_bytes'] = sizes[-1]
  costs = [counts[0].operations, operations(name, WIDTHS[1])]
  found['width'] = slope(WIDTHS, costs)
  if 'chunk_size' in mixer_options(name):
    costs = [operations(name, D, chunk_size=size) for size in CHUNKS]
    found['chunk'] = slope(CHUNKS, costs)
  return found


def all_exponents() -> dict:
  """R17: the exponents of every row."""
  return {name: exponents(name) for name in MIXERS}


def agrees(row: dict) -> bool:
  """Whether counted exponents are those that the row of MIXERS states."""
  near = abs(row['time'] - row['stated_time']) < 0.1
  if row['stated_state'] == 'log':
    return near and 0 < row['state'] < 0.3
  return near and (
    'state' not in row or abs(row['state'] - row['stated_state']) < 0.03
  )


def _table(values) -> list:
  def cell(row, key):
    return round(row[key], 2) if key in row else ''

  return [
    page.Table(
      [
        'mixer',
        'time',
        'stated',
        'in d',
        'in C',
        'memory',
        'state',
        'stated',
        'state bytes',
      ],
      [
        [
          name,
          cell(row, 'time'),
          row['stated_time'],
          cell(row, 'width'),
          cell(row, 'chunk'),
          cell(row, 'memory'),
          cell(row, 'state'),
          row['stated_state'],
          row.get('state_bytes', ''),
        ]
        for name, row in values.items()
      ],
    ),
    page.Text(
      f'Exponents of N over {LENGTHS} tokens, width {D}, {HEADS} heads: '
      'arithmetic and largest array of a forward and backward pass, and the '
      f'decode state. The arithmetic of {LENGTHS[0]:,} tokens in the width d '
      f'over {WIDTHS} and in the chunk size C over {CHUNKS}.',
      note=True,
    ),
  ]


def _range(values, key) -> str:
  found = [values[name][key] for name in CHUNKED]
  return f'{min(found):.2f} to {max(found):.2f}'


def _linear(values, *names):
  return all(values[name]['state'] < 0.02 for name in names)


R17 = Claim(
  title='Complexity of every mixer in the length',
  tier='b',
  measure=all_exponents,
  parts=_table,
  statements=(
    Statement(
      says='Every row of the method table has the exponents it states',
      source=OURS,
      measured=lambda v: (
        ', '.join(n for n, row in v.items() if not agrees(row)) or 'all'
      ),
      judge=lambda v: HOLDS if all(map(agrees, v.values())) else FAILS,
      rule='time within 0.1, state within 0.03',
    ),
    Statement(
      says='Attention trains in O(N^2 d) time',
      source='AS tables 2-7',
      printed='O(N^2 d)',
      measured=lambda v: (
        f'N^{v["attention"]["time"]:.2f}, d^{v["attention"]["width"]:.2f}'
      ),
      judge=lambda v: (
        HOLDS
        if abs(v['attention']['time'] - 2) < 0.1
        and abs(v['attention']['width'] - 1) < 0.1
        else FAILS
      ),
      rule='both exponents within 0.1',
    ),
    Statement(
      says='Recurrences train in chunks in O(N C d + N d^2) time',
      source='AS tables 5-7',
      printed='O(N C d + N d^2)',
      measured=lambda v: (
        f'eight rows: N^{_range(v, "time")}, d^{_range(v, "width")}, '
        f'C^{_range(v, "chunk")}'
      ),
      judge=lambda v: (
        HOLDS
        if all(
          abs(row['time'] - 1) < 0.1
          and 0.9 < row['width'] < 2.1
          and -0.1 < row['chunk'] < 1.1
          for row in (v[name] for name in CHUNKED)
        )
        else FAILS
      ),
      rule='exponents within 0.1 of 1 in N, of 1 to 2 in d and of 0 to 1 in C',
    ),
    Statement(
      says='Decoding with linear attention takes O(N d) memory',
      source='AS p. 34 and 40, tables 5-7',
      printed='O(N d)',
      measured=lambda v: f'N^{v["linear"]["state"]:.2f}',
      judge=lambda v: HOLDS if v['linear']['state'] > 0.5 else FAILS,
      rule='the state grows with N',
    ),
    Statement(
      says='Decoding with linear attention takes constant memory',
      source='AS p. 12, 32 and 35',
      printed='O(d^2)',
      measured=lambda v: f'{v["linear"]["state_bytes"]:,} bytes at any length',
      judge=lambda v: (
        HOLDS
        if _linear(v, 'linear', 'gla', 'deltanet', 'gated_deltanet', 'mamba')
        else FAILS
      ),
      rule='exponent below 0.02 for five recurrences',
    ),
    Statement(
      says='DeltaNet in chunks and Gated DeltaNet train in O(d) space',
      source='AS table 7',
      printed='O(d)',
      measured=lambda v: f'N^{v["deltanet"]["memory"]:.2f}',
      judge=lambda v: HOLDS if v['deltanet']['memory'] < 0.1 else FAILS,
      rule='the largest array does not grow with N',
    ),
  ),
)

COMPLEXITY = {'R17': R17}
