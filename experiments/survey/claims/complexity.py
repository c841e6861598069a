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

D, HEADS = 64, 4
LENGTHS = (16_384, 65_536)


def build(name: str, length: int) -> nnx.Module:
  """The mixer of a row with its own options, for sequences of `length`."""
  limits = dict(
    max_len=length,
    max_length=length,
    max_blocks=length // 64,
    num_levels=length.bit_length(),
  )
  options = {k: v for k, v in limits.items() if k in mixer_options(name)}
  return mixer(name, D, HEADS, causal=MIXERS[name].causal, **options)


def sequence(length: int) -> jax.ShapeDtypeStruct:
  """What a row reads, [1, length, D]."""
  return jax.ShapeDtypeStruct((1, length, D), jnp.float32)


def exponents(name: str) -> dict:
  """Exponents of one row: arithmetic and memory of a training pass, state."""
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
  return [
    page.Table(
      ['mixer', 'time', 'stated', 'memory', 'state', 'stated', 'state bytes'],
      [
        [
          name,
          round(row['time'], 2),
          row['stated_time'],
          round(row['memory'], 2),
          round(row['state'], 2) if 'state' in row else '',
          row['stated_state'],
          row.get('state_bytes', ''),
        ]
        for name, row in values.items()
      ],
    ),
    page.Text(
      f'Exponents of N over {LENGTHS} tokens, width {D}, {HEADS} heads: '
      'arithmetic and largest array of a forward and backward pass, and the '
      'decode state.',
      note=True,
    ),
  ]


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
      source='this framework',
      measured=lambda v: (
        ', '.join(n for n, row in v.items() if not agrees(row)) or 'all'
      ),
      judge=lambda v: HOLDS if all(map(agrees, v.values())) else FAILS,
      rule='time within 0.1, state within 0.03',
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
