"""The shapes that statements share, and where claims are kept."""

import importlib
import pkgutil

import pytest

from experiments.survey import claims
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  holds,
  less,
  listed,
  more,
  statement,
)


def test_a_statement_is_the_function_below_its_text():
  @statement('x is 1', 'AS p. 1', '1', rule='to 0.5', provenance=DERIVED)
  def x_is_one(values):
    x = values['x']
    return holds(abs(x - 1) < 0.5, restated=x < 3), f'{x:.1f}'

  assert (x_is_one.says, x_is_one.source) == ('x is 1', 'AS p. 1')
  assert (x_is_one.printed, x_is_one.rule) == ('1', 'to 0.5')
  assert x_is_one.provenance == DERIVED
  found = [x_is_one.judge(dict(x=x)) for x in (1, 2, 3)]
  assert found == [HOLDS, RESTATED, FAILS]
  assert x_is_one.measured(dict(x=2)) == '2.0'


def test_less_and_more_read_the_figure_at_a_path():
  values = dict(a=dict(b=2.0), c=5.0)
  assert less('a', 'b', than=2.1)(values) == HOLDS
  assert less('a', 'b', than=2)(values) == FAILS
  assert more('c', than=4.9)(values) == HOLDS
  assert more('c', than=5)(values) == FAILS


def test_listed_joins_rows():
  assert listed('{:.1f} at {}', [1, 2], 'ab') == '1.0 at a, 2.0 at b'
  assert listed('{}', [], by='; ') == ''
  assert listed('{}', [1, 2], by='; ') == '1; 2'
  with pytest.raises(ValueError, match='shorter'):
    listed('{} {}', [1, 2], [1])


def test_every_module_of_claims_holds_a_claim_that_is_counted():
  for info in pkgutil.iter_modules(claims.__path__):
    module = importlib.import_module(f'{claims.__name__}.{info.name}')
    held = [x for x in vars(module).values() if isinstance(x, Claim)]
    assert held, f'{info.name} holds no claim: it belongs beside claims/'
    assert all(x in claims.CLAIMS.values() for x in held), info.name
