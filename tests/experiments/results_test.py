"""Stored results show what their studies are for, and so do new runs."""

import argparse
import pathlib
import statistics

import pytest

from efficient_attn import config as configs
from efficient_attn.train.workdir import differences
from experiments.ablations import records, report, study
from launch import ablate

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'experiments' / 'ablations' / 'results'


def scores(folder, studied):
  """(task, architecture) -> the metric of each seed, by the best pair."""
  return {
    (r['task'], r['architecture']): [
      report.score(run, studied.metric)
      for run in report.best_runs(r, studied.metric)
    ]
    for r in records.read(folder).values()
  }


def shows_mqar(found):
  """Softmax and the delta rule solve it, nothing else does."""
  found = {name: value for (_, name), value in found.items()}
  assert min(found['attention'] + found['deltanet']) > 0.98
  for name in ('linear', 'gla', 'mamba'):
    assert statistics.fmean(found[name]) < 0.95


def shows_mad(found):
  """Softmax and the delta rule find values again; a plain sum of them not."""
  for name in ('attention', 'deltanet'):
    assert min(found['in_context_recall', name]) > 0.98
  assert max(found['in_context_recall', 'linear']) < 0.5


def shows_state_tracking(found):
  """Negative eigenvalues keep a parity, positive ones guess."""
  assert min(found['parity', 'deltanet negative']) > 0.99
  for name in ('deltanet', 'deltaproduct'):
    assert max(found['parity', f'{name} positive']) < 0.65
  # Permutations of three want two reflections a token.
  kept = {
    n: statistics.fmean(v) for (task, n), v in found.items() if task != 'parity'
  }
  best = kept.pop('deltaproduct negative')
  assert best > 0.75 > 0.65 > max(kept.values())


def shows_state_size(found):
  """More state recalls more; all keys recall everything."""
  means = {name: statistics.fmean(v) for (_, name), v in found.items()}
  assert means['attention'] > 0.98
  for row in ('deltanet', 'linear'):
    assert means[f'{row} 16'] < means[f'{row} 64']
  assert means['window 8'] < means['window 32'] < means['attention']
  assert means['deltanet 64'] > means['linear 64']


def shows_lm_quality(found):
  """A hybrid is better than attention, and that than the ungated linear one."""
  means = {name: statistics.fmean(v) for (_, name), v in found.items()}
  hybrid = means['3 gated_deltanet : 1 attention']
  assert hybrid < means['attention'] < means['linear']


def shows_lm_quality_at_equal_state(found):
  """With as large a state a gated delta rule is better than attention."""
  means = {name: statistics.fmean(v) for (_, name), v in found.items()}
  assert means['gated_deltanet'] < means['attention']


def shows_vit_mixers(found):
  """Every mixer beats the linear classifier's guess by far."""
  assert all(min(value) > 0.5 for value in found.values())


# Folder of results -> what they show. 'a.b' is the study a.py:tiny,b.
CHECKS = {
  'mqar': shows_mqar,
  'mad': shows_mad,
  'state_tracking': shows_state_tracking,
  'state_size': shows_state_size,
  'lm_quality': shows_lm_quality,
  'lm_quality.state': shows_lm_quality_at_equal_state,
  'vit_mixers': shows_vit_mixers,
}


def path(name):
  file, _, arg = name.partition('.')
  arg = ','.join(filter(None, ('tiny', arg)))
  return f'{ROOT}/configs/ablations/{file}.py:{arg}'


def load(name):
  return study.load(path(name), {})


@pytest.mark.parametrize('name', CHECKS)
def test_stored_results_are_whole_and_show_it(name):
  _, studied = load(name)
  found = scores(RESULTS / name, studied)
  assert set(found) == {
    (task, name) for task in studied.tasks for name in studied.architectures
  }
  assert {len(value) for value in found.values()} == {3}
  CHECKS[name](found)
  assert 'launch/ablate.py' in (RESULTS / name / 'report.md').read_text()


def test_the_published_cell_is_of_its_config_and_not_judged():
  """In 4 of 64 epochs attention is on its way to the published 1.0."""
  values, studied = study.load(f'{ROOT}/configs/ablations/mqar.py:cell', {})
  (program,) = study.programs(values, studied)
  (record,) = records.read(RESULTS / 'mqar_cell').values()
  assert record['architecture'] == program.architecture == 'attention 64'
  stored = configs.resolve(record['config'])  # keys since then: as by default
  for key in ('model', 'data', 'optimizer', 'steps', 'batch_size'):
    pair = (getattr(config, key) for config in (stored, program.config))
    assert not [*differences(*pair, key)]
  (run,) = record['runs']
  assert 0.3 < report.score(run, 'accuracy') < 1
  text = (RESULTS / 'mqar_cell' / 'report.md').read_text()
  assert '| 1.000 |' in text and 'within band' not in text


@pytest.mark.study
@pytest.mark.parametrize('name', CHECKS)
def test_a_new_run_shows_it(name, tmp_path):
  args = argparse.Namespace(
    config=path(name),
    out=tmp_path,
    dry_run=False,
  )
  ablate.run(args, {}, 'the command')
  CHECKS[name](scores(tmp_path, load(name)[1]))
