"""Printed equations against the corrected ones, each by its error."""

import jax
import jax.numpy as jnp

from efficient_attn.models import cost
from efficient_attn.ops.low_rank.synthesizer import factorized_dense
from efficient_attn.ops.softmax.logits import attend_logits
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  UNDEFINED,
  Claim,
  Statement,
  holds,
  statement,
)
from experiments.survey.misprints import MISPRINTS
from experiments.survey.sources import OURS

# Misprints that another claim judges.
JUDGED_IN = {'E10': 'R22', 'E11': 'R33', 'E25': 'R19'}


def exponents() -> list[float]:
  """Of the FLOPs of a factorised Synthesizer, as printed and corrected."""

  def printed(outer, inner, value):
    rows = jnp.repeat(outer, inner.shape[-1], axis=-1)
    columns = jnp.tile(inner, outer.shape[-1])
    return attend_logits(rows @ columns.swapaxes(-1, -2), value)

  def corrected(outer, inner, value):
    return attend_logits(factorized_dense(outer, inner), value)

  lengths, found = (512, 1024), []
  for form in (printed, corrected):
    flops = []
    for n in lengths:
      shapes = (1, 1, n, n // 4), (1, 1, n, 4), (1, n, 1, 8)
      arrays = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
      flops.append(cost.flops(form, *arrays))
    found.append(slope(lengths, flops))
  return found


def both_forms() -> dict:
  """R16: errors by misprint: printed, corrected, ours."""
  found = {name: list(row.errors()) for name, row in MISPRINTS.items()}
  return found | dict(exponents=exponents())


def _show(error) -> str:
  return error if isinstance(error, str) else f'{error:.2g}'


def _right(values, name) -> bool:
  return all(
    not isinstance(x, str) and x <= MISPRINTS[name].tolerance
    for x in values[name][1:]
  )


def _statement(name: str) -> Statement:
  row = MISPRINTS[name]

  @statement(
    row.says,
    row.source,
    row.printed,
    rule='error below 0.01, relative, against the definition; it does not hold '
    'only where our op is right',
  )
  def printed_form_is_right(v):
    printed, corrected, ours = v[name]
    text = (
      f'error {_show(printed)} as printed, {_show(corrected)} as '
      f'{row.corrected}, {_show(ours)} of our op'
    )
    if not isinstance(printed, str) and printed < 0.01:
      return HOLDS, text
    right = not isinstance(ours, str) and ours <= row.tolerance
    return FAILS if right else UNDEFINED, text

  return printed_form_is_right


@statement(
  'Logits of a factorised Synthesizer cost O(n^2), by its equation',
  'FL p. 23, eq. 26',
  'O(n^2)',
  rule='exponent as printed below 2.1; not well defined if ours is not',
)
def factors_are_quadratic(v):
  printed, ours = v['exponents']
  text = f'FLOPs n^{printed:.2f} as printed, n^{ours:.2f} corrected'
  if printed < 2.1:
    return HOLDS, text
  return FAILS if ours < 2.1 else UNDEFINED, text


@statement(
  'With the corrections every equation gives what it should',
  f'{OURS}, correcting AS and FL',
  rule='the corrected form and our op within rounding: 1e-12 in float64, 1e-4 '
  'in float32, half a step of 8 bits',
)
def corrections_are_right(v):
  right = sum(_right(v, name) for name in MISPRINTS)
  return holds(right == len(MISPRINTS)), f'{right} of {len(MISPRINTS)}'


def _table(values) -> list:
  head = [
    'erratum',
    'source',
    'printed',
    'corrected',
    'error of the printed form',
    'error of the corrected form',
    'error of our op',
  ]
  rows = [
    [name, row.source, row.printed, row.corrected, *map(_show, values[name])]
    for name, row in MISPRINTS.items()
  ]
  note = (
    'Errors are relative to the largest number of the definition, a loop over '
    'tokens in float64 where there is a recurrence. E11 is what 8 bits keep '
    'of weights, E13 the share of keys that are wrong, E14 what a token '
    'misses of its own value after its update. Verdicts on '
    + ', '.join(f'{name} are in {to}' for name, to in JUDGED_IN.items())
    + '.'
  )
  return [page.Table(head, rows), page.Text(note, note=True)]


R16 = Claim(
  title='Equations that are printed wrong',
  tier='b',
  measure=both_forms,
  seeds=(0,),
  parts=_table,
  statements=(
    *(_statement(name) for name in MISPRINTS if name not in JUDGED_IN),
    factors_are_quadratic,
    corrections_are_right,
  ),
)

ERRATA = {'R16': R16}
