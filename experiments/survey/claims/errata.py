"""Printed equations against the corrected ones, each by its error."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_attn.models import cost
from efficient_attn.ops.low_rank.synthesizer import factorized_dense
from efficient_attn.ops.softmax.logits import attend_logits
from experiments import page
from experiments.exponent import slope
from experiments.survey import errata_linear as linear
from experiments.survey import errata_other as other
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  UNDEFINED,
  Claim,
  Statement,
  holds,
  statement,
)
from experiments.survey.sources import OURS


@dataclasses.dataclass(frozen=True)
class Misprint:
  """A row of `MISPRINTS`.

  Attributes:
    source: where it is printed.
    says: what the printed equation does.
    printed: its part that is wrong.
    corrected: that part corrected.
    errors: () -> of the printed form, of the corrected one and of our op.
    tolerance: of the last two: what rounding alone may do.
  """

  source: str
  says: str
  printed: str
  corrected: str
  errors: Callable[[], tuple]
  tolerance: float = 1e-12


# [i] is chunk i of C tokens; A and B are the products of the gates a and b from
# the beginning of a chunk to each of its tokens.
MISPRINTS = {
  'E1': Misprint(
    'AS p. 34 and 57, eq. 57d',
    'A chunk reads the state through the value gates of the chunk before',
    '(Q A)[i+1] S[i] * B[i]',
    '(Q A)[i+1] S[i] * B[i+1]',
    functools.partial(linear.chunks, 'E1'),
  ),
  'E2': Misprint(
    'AS p. 57, eq. 108',
    'What a chunk writes decays from the token before on',
    'j = 0 .. C - 1',
    'j = 1 .. C',
    functools.partial(linear.chunks, 'E2'),
  ),
  'E3': Misprint(
    'AS p. 34 and 57, eq. 57a, 110, 111',
    'A chunk adds to the state of two chunks ago',
    'S[i+1] = zeta S[i-1] + K^T V',
    'S[i+1] = zeta S[i] + K^T V',
    functools.partial(linear.chunks, 'E3'),
  ),
  'E4': Misprint(
    'AS p. 56, eq. 103',
    'A key is multiplied with the gates and the keys of all later tokens',
    'prod_n a_n c_n k_n',
    '(prod_{n>m} a_n) c_m k_m',
    functools.partial(linear.chunks, 'E4'),
  ),
  'E5': Misprint(
    'AS p. 37, eq. 69',
    'RetNet reads the state with the queries of the chunk before',
    'O[i+1] = Q[i] S[i-1] * xi',
    'O[i+1] = Q[i+1] S[i] * xi',
    linear.retention,
  ),
  'E6': Misprint(
    'AS p. 38, eq. 75',
    'The first pass of GSA decays along channels, the second along values',
    '(alpha^T 1) * H1, (1^T alpha) * H2',
    '(1^T alpha) * H1, (alpha^T 1) * H2',
    linear.slots,
  ),
  'E7': Misprint(
    'AS eq. 46, Tables 6 and 7',
    'The transition of DeltaNet and RWKV-7 multiplies entry by entry',
    'G * S',
    'G S, a product of matrices',
    linear.transition,
  ),
  'E8': Misprint(
    'AS eq. 24, 26, 30 and 33',
    'Kv heads are repeated as K (x) 1',
    'K (x) 1',
    '1 (x) K for each kv head',
    other.kv_heads,
  ),
  'E10': Misprint(
    'FL p. 25, eq. 34',
    'Random features of exp(x . y) have the exponent w . x |x|^2 / 2',
    'exp(w . x |x|^2 / 2)',
    'exp(w . x - |x|^2 / 2)',
    other.random_features,
  ),
  'E11': Misprint(
    'FL p. 11, eq. 10-11',
    'N bits hold the codes round(W / s + z)',
    'round(W / s + z)',
    'round(W / s - z)',
    other.quantisation,
    tolerance=3e-3,  # half a step
  ),
  'E12': Misprint(
    'FL p. 23, eq. 26',
    'The factors of a Synthesizer meet in a product of matrices',
    'H_A(A) H_B(B)^T',
    'H_A(A) * H_B(B)',
    other.factors,
  ),
  'E13': Misprint(
    'FL p. 18',
    'The farthest key of LogSparse has the index -2^floor(log2 i)',
    '-2^floor(log2 i)',
    'i - 2^floor(log2 i)',
    other.log_sparse,
  ),
  'E14': Misprint(
    'AS eq. 92',
    'Fast weights descend without a learning rate',
    'S - g',
    'S - eta g',
    other.learning_rate,
  ),
  'E14, index': Misprint(
    'AS eq. 93',
    'The gradient of a mini-batch is a sum over i of terms of token t',
    'sum_i grad L(f(k_t), v_t)',
    'sum_i grad L(f(k_i), v_i)',
    other.index_of_the_sum,
  ),
  'E15': Misprint(
    'AS p. 40',
    'The transition of RWKV-7 stands left of the value x key state',
    'G S + v^T k',
    'S G + v^T k',
    linear.side,
  ),
  'E16': Misprint(
    'AS p. 18, eq. 32',
    'MFA makes its query with W^down twice',
    'x W^down W^down',
    'x W^down W^up',
    other.query_of_mfa,
  ),
  'E17': Misprint(
    'AS section 5, text',
    'Weights of keys have h d rows',
    'W_K: h d x d',
    'W_K: D_m x d',
    other.width_of_keys,
  ),
  'E18': Misprint(
    'AS p. 31, Table 1',
    'The state that a token reads ends with the token before',
    'sum_{i <= t - 1} k_i^T v_i',
    'sum_{i <= t} k_i^T v_i',
    linear.own_token,
  ),
  'E19': Misprint(
    'AS eq. 43 and 47, against 48',
    'Sums without a denominator are the normalised method',
    'q S',
    'q S / q z',
    linear.normalisation,
  ),
  'E20': Misprint(
    'AS Fig. 3',
    'The mask inside a chunk is d x d',
    'd x d',
    'C x C',
    linear.mask_of_a_chunk,
  ),
  'E25': Misprint(
    'AS p. 38, eq. 56',
    'Products of gates over all tokens are multiplied and divided by',
    'prod a, 1 / prod a, in float32',
    'exp(sum of log a over the span)',
    linear.products_of_gates,
    tolerance=1e-4,
  ),
}


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
