"""The survey: every claim gets a verdict, errors stop nothing, it resumes."""

import argparse
import dataclasses
import json
import pathlib
import re

import pytest

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers import MIXERS
from experiments.exponent import slope
from experiments.survey import report, run
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  NOT_HERE,
  RESTATED,
  UNDEFINED,
  VERDICTS,
  equals,
  within,
)
from experiments.survey.claims import CLAIMS
from experiments.survey.claims.complexity import agrees, exponents
from launch import survey

# Statements that counting shows to be wrong, to want another wording, or to say
# nothing.
WRONG = {
  'R01': {'Scores of 128K tokens take 64 GB'},
  'R03': {
    'A 7B model needs about 1 GB at 4K tokens',
    'With 128K tokens the cache of multi-head attention in a 70B model is 40 '
    'GB',
    'Grouped queries give a 70B model 128K tokens on a consumer GPU',
  },
  'R05': {'Latent attention compresses the cache 8 times'},
  'R06': {'MLA leaves the cost per cached token as it is'},
  'R09': {'FlashAttention-2 moves O(N d) elements in total'},
  'R24': {
    'A window needs O(sqrt n) layers to reach every token',
    'Sinkhorn attention stays quadratic in the length',
  },
  'R40': {
    'Sparse attention takes memory O(N k)',
    'Linear attention takes memory O(d^2)',
    'Mamba takes time O(n d) and memory O(d)',
  },
}


@pytest.mark.parametrize('name', sorted(WRONG))
def test_counting_finds_what_is_wrong_and_nothing_else(name):
  claim = CLAIMS[name]
  found = dict(values=json.loads(json.dumps(claim.measure())))
  verdicts = dict(
    zip(
      [statement.says for statement in claim.statements],
      run.verdicts(claim, found),
      strict=True,
    )
  )
  assert set(verdicts.values()) <= set(VERDICTS)
  assert {s for s, verdict in verdicts.items() if verdict != HOLDS} == (
    WRONG[name]
  )
  for statement in claim.statements:
    assert statement.measured(found['values'])
  for part in claim.parts(found['values']):
    assert part.html() and part.markdown()


STORED = pathlib.Path(run.__file__).parent / 'results' / 'results.json'


def stored_rows():
  record = json.loads(STORED.read_text())
  return record['claims']['R17']['values']


def test_stored_results_are_of_every_claim():
  record = json.loads(STORED.read_text())
  assert set(record['claims']) == set(CLAIMS)
  for name, claim in CLAIMS.items():
    found = record['claims'][name]
    assert set(run.verdicts(claim, found)) <= set(VERDICTS)
    assert claim.tier == 'c' or found['values']
  assert 'python launch/survey.py' in STORED.with_name('report.md').read_text()
  for name, row in stored_rows().items():
    stated = dict(stated_time=MIXERS[name].time)
    if MIXERS[name].causal:
      stated['stated_state'] = MIXERS[name].state
    assert agrees(row | stated), name


# A row is counted anew until the stored results have it.
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name, marks=pytest.mark.exhaustive if name in stored_rows() else ()
    )
    for name in sorted(MIXERS)
  ],
)
def test_a_row_costs_what_it_states(name):
  assert agrees(exponents(name))


def when(name):
  """Claims that train for minutes are for --all; the others take turns."""
  seconds = json.loads(STORED.read_text())['claims'][name]['seconds']
  return pytest.mark.study if seconds > 60 else pytest.mark.exhaustive


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=when(name)) for name in sorted(CLAIMS)]
)
def test_a_new_measurement_gets_the_stored_verdicts(name):
  claim = CLAIMS[name]
  if claim.tier == 'c':
    pytest.skip('wants an accelerator')
  stored = json.loads(STORED.read_text())['claims'][name]
  found = dict(values=json.loads(json.dumps(claim.measure())))
  assert run.verdicts(claim, found) == run.verdicts(claim, stored)


def test_every_claim_is_well_formed():
  for name, claim in CLAIMS.items():
    assert re.fullmatch(r'R\d\d', name) and claim.tier in ('a', 'b', 'c')
    assert claim.statements
    for statement in claim.statements:
      assert statement.source and statement.rule
    # What draws numbers says from which seeds.
    assert list(claim.seeds) == sorted(set(claim.seeds))


def failing():
  raise RuntimeError('broken on purpose')


ONE = dataclasses.replace(
  CLAIMS['R05'],
  title='One',
  tier='b',
  measure=lambda: dict(x=2.0),
  statements=(
    equals('x is 2', 'here', '2', 'x', 2),
    within('x is large', 'here', '', 'x', 10, 20, otherwise=RESTATED),
  ),
)
within_y = within('y is small', 'AS p. 1', '', 'y', 0, 2)
FAKE = {
  'R97': ONE,
  'R98': dataclasses.replace(ONE, title='Two', measure=failing),
  'R99': dataclasses.replace(ONE, title='Three', tier='c', measure=failing),
}


@pytest.mark.in_turn
def test_a_failing_claim_stops_nothing_and_is_tried_again(tmp_path):
  record = run.measure(FAKE, tmp_path)
  assert run.verdicts(ONE, record['claims']['R97']) == [HOLDS, RESTATED]
  assert run.verdicts(ONE, record['claims']['R98']) == ['ERROR'] * 2
  assert run.verdicts(ONE, record['claims']['R99']) == [NOT_HERE] * 2
  assert 'broken on purpose' in record['claims']['R98']['error']
  report.write(FAKE, record, 'the command', tmp_path)
  html = (tmp_path / 'report.html').read_text()
  assert 'broken on purpose' in html and 'src=' not in html
  # Nothing is loaded: the links are text.
  assert not re.search(r'(href|src|url\()=?.?https?://', html)
  assert 'NOT MEASURED ON THIS DEVICE' in (tmp_path / 'report.md').read_text()

  mended = FAKE | {
    'R97': dataclasses.replace(ONE, measure=failing),  # is not measured again
    'R98': dataclasses.replace(ONE, measure=lambda: dict(x=15.0)),
  }
  record = run.measure(mended, tmp_path)
  assert record['claims']['R97']['values'] == dict(x=2.0)
  assert run.verdicts(ONE, record['claims']['R98']) == [FAILS, HOLDS]


@pytest.mark.in_turn
def test_a_value_keeps_what_it_was_made_with(tmp_path, monkeypatch):
  first = run.measure(FAKE, tmp_path)['claims']['R97']
  assert first['commit'] and first['versions']['jax'] and first['seeds'] == []
  pins = (tmp_path / 'constraints.txt').read_text()
  for name, version in first['versions'].items():
    assert f'{name}=={version}\n' in pins
  here = run.machine() | dict(date='2999-12-31')
  monkeypatch.setattr(run, 'machine', lambda: here)
  again = run.measure({'R97': ONE}, tmp_path)
  assert again['claims']['R97'] == first  # of the day when it was measured
  report.write(FAKE, again, 'the command', tmp_path)
  text = (tmp_path / 'report.md').read_text()
  assert f'on {first["date"]}, {first["cores"]} cores of' in text
  assert 'OUTDATED' not in text

  monkeypatch.setattr(run, 'fingerprint', lambda function: 'other code')
  again = run.measure({'R97': ONE}, tmp_path)  # is marked, not measured
  assert again['claims']['R97'] == first and run.outdated(ONE, first)
  report.write({'R97': ONE}, again, 'the command', tmp_path)
  text = (tmp_path / 'report.md').read_text()
  assert 'OUTDATED' in text and 'changed since: R97.' in text
  again = run.measure({'R97': ONE}, tmp_path, again=True)['claims']['R97']
  assert again['code'] == 'other code' and again['date'] == '2999-12-31'

  # Values of other code that the rules cannot read are measured again.
  monkeypatch.setattr(run, 'fingerprint', lambda function: 'third code')
  changed = dataclasses.replace(ONE, statements=(within_y,))
  assert not run.fits(changed, first)
  mended = dataclasses.replace(changed, measure=lambda: dict(y=1.0))
  found = run.measure({'R97': mended}, tmp_path)['claims']['R97']
  assert found['values'] == dict(y=1.0)

  monkeypatch.setattr(run, 'machine', lambda: here | dict(device='tpu'))
  found = run.measure({'R97': ONE}, tmp_path)['claims']['R97']
  assert found['device'] == 'tpu'  # another device measures anew


def test_a_damaged_file_is_one_line(tmp_path):
  (tmp_path / 'results.json').write_text('{"claims": {"R97')
  with pytest.raises(ConfigError, match='results.json is damaged: .*delete it'):
    run.measure(FAKE, tmp_path)


@pytest.mark.in_turn
def test_the_command(tmp_path, capsys):
  args = argparse.Namespace(tier='a', only='R05', out=tmp_path)
  survey.run(args, 'the command')
  said = capsys.readouterr().out
  assert UNDEFINED in said and 'report in' in said
  for wrong in (dict(only='R5'), dict(tier='d')):
    with pytest.raises(ConfigError):
      survey.run(argparse.Namespace(**vars(args) | wrong), '')


def test_slope():
  assert slope([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2)
