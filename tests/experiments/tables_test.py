"""The tables of the surveys: every cell has a mark, a value or a reason."""

import json
import pathlib

import pytest

from efficient_attn.decode.eviction import POLICIES
from efficient_attn.layers.mixers import MIXERS
from efficient_attn.ops.selection import SELECTORS
from experiments import page
from experiments.survey import printed, report, run, tables
from experiments.survey.claim import FAILS, HOLDS, RESTATED, UNDEFINED
from experiments.survey.claims import CLAIMS

CLAIMS_OF_TWO_ROWS = {
  'R17': {
    'linear': dict(time=1.0, memory=1.0, state=0.0),
    'entmax': dict(time=2.0, memory=2.0, state=1.0),
  },
  'R11': {'int8 smooth 0': 0.012},
  'R24': {'strided exponent': 1.5},
  'R29': {'attention': dict(mean=2.0), 'linear': dict(mean=2.5)},
}


def rows(name, claims):
  table = tables.TABLES[name][0](claims)
  assert all(len(row) == len(table.head) for row in table.rows)
  return {row[0]: row for row in table.rows}


@pytest.mark.parametrize('claims', [{}, CLAIMS_OF_TWO_ROWS])
def test_every_table_is_made_whatever_was_measured(claims):
  parts = tables.tables(claims)
  assert len(parts) == 2 * len(tables.TABLES)
  for part in parts:
    assert part.html() and part.markdown()


def test_what_is_counted_stands_beside_what_is_printed():
  made = rows('AS 5', CLAIMS_OF_TWO_ROWS)['Linear Transformer']
  assert made[5:7] == ['O(N^2 d)', 'N^1.97, here N^1.00 ✓']
  assert made[11:] == ['O(N d^2)', 'N^1.00 ✓', 'O(N d)', 'N^0.00 ✗']
  made = rows('FL 4', CLAIMS_OF_TWO_ROWS)
  assert made['Adaptively sparse'][2] == 'N^2.00 ✓'
  assert made['Sparse Transformer'][2:] == ['not measured', 'pairs N^1.50 ✓']
  assert made['Reformer'][3] == 'hashing R25 not run'
  made = rows('S003', CLAIMS_OF_TWO_ROWS)['Linear/Kernel']
  assert made[-4:] == ['~95%', '80.0 %', 'R30 not run', 'R21 not run']
  made = rows('AS 2', CLAIMS_OF_TWO_ROWS)['SageAttention']
  assert made[2:] == ['INT8', 'int8 ✓', '-', 'float16 ✓', '0.012']


def test_caches_say_what_is_stored():
  made = rows('AS 4', {})
  assert made['H2O'][5] == '0.02 ✓'
  assert made['NSA'][5] == '1.07 ✗'


def test_what_is_not_built_here_gets_no_cross():
  made = rows('AS 4', {})
  assert (
    made['MoA'][5] == made['DuoAttention'][5] == ('1.00, less not built here')
  )
  assert made['SparQ'][5] == 'all keys, less not built here'
  form = rows('AS 5', {})['CHELA'][10]
  assert form == 'recurrent, chunkwise; quadratic not built here'
  assert tables.kind(form) == 'open'
  for name in ('AS 5', 'AS 6', 'AS 7'):
    assert not any(row[10].endswith('✗') for row in rows(name, {}).values())


def test_kinds():
  found = [tables.kind(c) for c in ('a ✓', 'a ✗', 'R17 not run', 'N^2', 3)]
  assert found == ['good', 'bad', 'open', '', '']


def test_every_method_and_cost_is_known():
  known = (
    set(MIXERS)
    | {f'selector {name}' for name in SELECTORS}
    | {f'policy {name}' for name in POLICIES}
  )
  for table in (
    printed.AS4,
    printed.AS5,
    printed.AS6,
    printed.AS7,
    printed.FL4,
    printed.S003,
  ):
    assert {row[0] for row in table.values()} <= known
  assert printed.S003.keys() == printed.TRAINED.keys()
  assert (
    printed.EXACT.keys() | printed.SAGE.keys() | printed.TWO_BITS.keys()
  ) < (printed.AS2.keys())
  assert {'R07', 'R11', 'R12', 'R13', 'R14', 'R17', 'R21', 'R24', 'R25', 'R29',
          'R30'} <= CLAIMS.keys()  # fmt: skip


def test_every_kind_of_verdict_has_its_own_colour():
  kinds = {report.kind(v) for v in (HOLDS, RESTATED, FAILS, UNDEFINED)}
  assert len(kinds) == 4
  for name in kinds:
    assert f'.{name} {{ color: var(--{name}); }}' in page.STYLE


def test_axes_of_the_budgets_start_at_0():
  stored = pathlib.Path(run.__file__).parent / 'results' / 'results.json'
  values = json.loads(stored.read_text())['claims']['R27']['values']
  plots = [
    part.figure.axes[0]
    for part in CLAIMS['R27'].parts(values)
    if isinstance(part, page.Plot)
  ]
  assert len(plots) == 3
  for axes in plots:
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    drawn = [(line.get_color(), line.get_marker()) for line in axes.lines]
    assert len(set(drawn)) == len(drawn)
