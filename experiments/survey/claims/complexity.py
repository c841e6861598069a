"""Exponents of every mixer in length, counted on its jaxpr and its cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers import MIXERS, mixer_options
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  Claim,
  Statement,
  holds,
  less,
  listed,
  more,
  statement,
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
    cube=(64,),
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
  columns = {
    'time': 'time',
    'stated_time': 'stated',
    'width': 'in d',
    'chunk': 'in C',
    'memory': 'memory',
    'state': 'state',
    'stated_state': 'stated',
    'state_bytes': 'state bytes',
  }

  def cell(x):
    return round(x, 2) if isinstance(x, float) else x

  rows = [
    [name, *(cell(row.get(key, '')) for key in columns)]
    for name, row in values.items()
  ]
  return [
    page.Table(['mixer', *columns.values()], rows),
    page.Text(
      f'Exponents of N over {LENGTHS} tokens, width {D}, {HEADS} heads: '
      'arithmetic and largest array of a forward and backward pass, and the '
      f'decode state. The arithmetic of {LENGTHS[0]:,} tokens in the width d '
      f'over {WIDTHS} and in the chunk size C over {CHUNKS}.',
      note=True,
    ),
  ]


@statement(
  'Every row of the method table has the exponents it states',
  OURS,
  rule='time within 0.1, state within 0.03',
)
def rows_agree(v):
  wrong = [name for name, row in v.items() if not agrees(row)]
  return holds(not wrong), ', '.join(wrong) or 'all'


@statement(
  'Attention trains in O(N^2 d) time',
  'AS tables 2-7',
  'O(N^2 d)',
  rule='both exponents within 0.1',
)
def attention_is_quadratic(v):
  time, width = v['attention']['time'], v['attention']['width']
  verdict = holds(abs(time - 2) < 0.1 and abs(width - 1) < 0.1)
  return verdict, f'N^{time:.2f}, d^{width:.2f}'


@statement(
  'Recurrences train in chunks in O(N C d + N d^2) time',
  'AS tables 5-7',
  'O(N C d + N d^2)',
  rule='exponents within 0.1 of 1 in N, of 1 to 2 in d and of 0 to 1 in C',
)
def chunks_are_linear(v):
  keys = ('time', 'width', 'chunk')
  times, widths, chunks = found = [[v[n][k] for n in CHUNKED] for k in keys]
  verdict = holds(
    all(abs(x - 1) < 0.1 for x in times)
    and all(0.9 < x < 2.1 for x in widths)
    and all(-0.1 < x < 1.1 for x in chunks)
  )
  text = listed('{}^{:.2f} to {:.2f}', 'NdC', map(min, found), map(max, found))
  return verdict, f'eight rows: {text}'


@statement(
  'Decoding with linear attention takes constant memory',
  'AS p. 12, 32 and 35',
  'O(d^2)',
  rule='exponent below 0.02 for five recurrences',
)
def states_are_constant(v):
  names = ('linear', 'gla', 'deltanet', 'gated_deltanet', 'mamba')
  text = f'{v["linear"]["state_bytes"]:,} bytes at any length'
  return holds(all(v[name]['state'] < 0.02 for name in names)), text


R17 = Claim(
  title='Complexity of every mixer in the length',
  tier='b',
  measure=all_exponents,
  parts=_table,
  statements=(
    rows_agree,
    attention_is_quadratic,
    chunks_are_linear,
    Statement(
      says='Decoding with linear attention takes O(N d) memory',
      source='AS p. 34 and 40, tables 5-7',
      printed='O(N d)',
      measured='N^{linear[state]:.2f}'.format_map,
      judge=more('linear', 'state', than=0.5),
      rule='the state grows with N',
    ),
    states_are_constant,
    Statement(
      says='DeltaNet in chunks and Gated DeltaNet train in O(d) space',
      source='AS table 7',
      printed='O(d)',
      measured='N^{deltanet[memory]:.2f}'.format_map,
      judge=less('deltanet', 'memory', than=0.1),
      rule='the largest array does not grow with N',
    ),
  ),
)

COMPLEXITY = {'R17': R17}
