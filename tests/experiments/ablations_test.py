"""Studies: what is planned, resumed, matched and reported."""

import argparse
import json
import math
import re

import numpy as np
import pytest

from efficient_attn.config import ConfigError
from experiments.ablations import harness, report, study
from experiments.ablations.match import matched, sizes
from launch import ablate

STUDY = """
def get_config(arg=''):
  return dict(
    model=dict(name='lm', d_model=32, num_layers=1, num_heads=2, vocab_size=16,
               ffn='none'),
    data=dict(name='compression', valid_examples=8),
    steps=4, batch_size=4)

def sweep(arg=''):
  return dict(
    title='A study',
    architectures={
      'attention': {'model.pattern': ('attention',)},
      'gla': {'model.pattern': ('gla',)},
    },
    tasks={'short': {'data.options': dict(seq_len=8)}, 'long': {}},
    tests={'same': {}, 'longer': dict(seq_len=40)},
    learning_rates=(1e-3, 1e-2),
    seeds=(0, 1),
    match='params',
    published={'short': {'gla': 0.5}},
    band=0.1,
    source='nowhere',
  )
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  file = tmp_path_factory.mktemp('study') / 'study.py'
  file.write_text(STUDY)
  return str(file)


def call(config, out=None, **changes):
  args = argparse.Namespace(config=config, out=out, dry_run=out is None)
  ablate.run(args, changes, 'the command')


def test_a_study_runs_resumes_and_reports(config, tmp_path, capsys):
  call(config, tmp_path)
  records = [
    json.loads(line)
    for line in (tmp_path / 'results.jsonl').read_text().splitlines()
  ]
  assert [(r['task'], r['architecture']) for r in records] == [
    (task, name) for task in ('short', 'long') for name in ('attention', 'gla')
  ]
  for record in records:
    assert len(record['runs']) == 4 and len(record['runs'][0]['losses']) == 4
    assert set(record['runs'][0]['tests']) == {'same', 'longer'}
  params = [record['sizes']['params'] for record in records]
  assert max(params) < 1.25 * min(params)
  html = (tmp_path / 'report.html').read_text()
  assert html.count('<svg') == 4 and 'src=' not in html
  assert not re.search(r'https?://(?!www\.w3\.org)', html)
  assert 'within band' in (tmp_path / 'report.md').read_text()

  # One program lost, one only half written: those two run again.
  lines = (tmp_path / 'results.jsonl').read_text().splitlines()
  (tmp_path / 'results.jsonl').write_text(
    '\n'.join([lines[0], lines[2], lines[3][:100]]) + '\n'
  )
  capsys.readouterr()
  call(config, tmp_path)
  assert capsys.readouterr().out.count('done before') == 2
  again = harness.done(tmp_path)
  for record in records:
    assert again[record['key']]['runs'] == record['runs']


def test_dry_run_writes_nothing(config, capsys):
  call(config, **{'sweep.seeds': '0'})
  said = capsys.readouterr().out
  assert '4 programs' in said and 'short/gla' in said and '2 runs' in said


def test_mistakes(config):
  with pytest.raises(ConfigError, match="did you mean 'seeds'"):
    study.load(config, {'sweep.seed': '1'})
  with pytest.raises(ConfigError, match="did you mean 'params'"):
    study.load(config, {'sweep.match': 'param'})
  with pytest.raises(ConfigError, match='has no sweep'):
    study.load('configs/lm/quickstart.py', {})


def test_sizes_are_counted_and_matched(config):
  values, studied = study.load(config, {})
  program = next(
    p for p in study.programs(values, studied) if p.architecture == 'gla'
  )
  batch = harness.first_batch(program.config)
  counted = sizes(program.config, batch)
  for quantity, times in (('params', 9), ('flops', 5)):
    config = matched(program.config, batch, quantity, times * counted[quantity])
    found = sizes(config, batch)[quantity] / counted[quantity]
    assert found == pytest.approx(times, rel=0.1)
    assert config.model.d_model % config.model.num_heads == 0
  with pytest.raises(ConfigError, match='the nearest to'):
    matched(program.config, batch, 'params', 10)


def test_state_of_attention_grows_with_the_length():
  values = dict(
    model=dict(name='lm', d_model=16, num_layers=2, num_heads=2, vocab_size=16),
    data=dict(name='compression'),
  )
  from efficient_attn import config as configs

  found = []
  for length in (32, 64):
    changed = configs.override(values, {'data.options': dict(seq_len=length)})
    resolved = configs.resolve(changed)
    found.append(sizes(resolved, harness.first_batch(resolved))['state'])
  # Two layers, keys and values of 16 channels, 4 bytes.
  assert found == [2 * 2 * 16 * 4 * 32, 2 * 2 * 16 * 4 * 64]


def test_intervals():
  mean, half = report.interval([1.0, 2.0, 3.0])
  assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
  assert math.isnan(report.interval([1.0])[1])
  rng = np.random.default_rng(0)
  covered = [
    abs(mean) <= half
    for mean, half in (
      report.interval(list(rng.standard_normal(3))) for _ in range(2000)
    )
  ]
  assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
