"""gpu.sh without a GPU: what it would run, how it goes on, what README says."""

import json
import os
import pathlib
import subprocess
import time

import numpy as np
import pytest

from experiments.benchmarks import SUITES, gpu, resume, training
from experiments.benchmarks.gpu import Part


def test_the_table_is_that_of_the_parts():
  text = gpu.README.read_text()
  assert gpu.updated(text) == text, (
    'run python -m experiments.benchmarks.gpu --readme'
  )


def test_the_parts_fit_their_limit():
  assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)
  assert gpu.LIMIT + 10 < 8 * 60
  assert sum(part.seconds for part in gpu.PARTS[:-1]) <= gpu.LIMIT


@pytest.mark.parametrize('part', gpu.PARTS, ids=lambda part: part.name)
def test_commands_name_what_is_there(part):
  words = part.command.split()
  script = next(w for w in words if w.endswith('.py') or w == 'pytest')
  assert script == 'pytest' or (gpu.ROOT / script).exists()
  for word in words:
    if word.startswith('--suite='):
      assert word.removeprefix('--suite=') in SUITES
    if word.startswith('tests/'):
      listed = ['bash', '-c', f'ls {word}']
      subprocess.run(listed, cwd=gpu.ROOT, check=True, capture_output=True)


def make(name, command, seconds=20):
  return Part(name, 'a test', command, seconds, '*.json')


def is_running(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2]
  except FileNotFoundError:
    return False
  return state != 'Z'


@pytest.mark.in_turn
def test_parts_resume_and_do_not_stop_each_other(tmp_path, capfd):
  child = tmp_path / 'child'
  parts = [
    make('a.json', 'echo said; echo 1 > $WORK/x.json'),
    make('b.json', 'echo 2 > $WORK/x.json; exit 3'),
    make('c.json', f'sleep 60 & echo $! > {child}; wait', seconds=0.5),
    make('d.json', 'true'),
    make('e.json', 'echo 5 > $WORK/x.json'),
  ]
  out = tmp_path / 'out'
  ended = gpu.run_all(out, parts)
  assert ended == {
    'a.json': 'done',
    'b.json': 'failed (3)',
    'c.json': 'more than 0 s',
    'd.json': 'failed (0)',
    'e.json': 'done',
  }
  assert (out / 'a.json').read_text() == '1\n'
  assert (out / 'failed.b.json').read_text() == '2\n'
  assert json.loads((out / 'ended.json').read_text()) == ended
  assert 'said' in (out / 'log.txt').read_text()

  parts[1] = make('b.json', 'echo 2 > $WORK/x.json')
  ended = gpu.run_all(out, parts[:2] + parts[4:])
  assert ended == {
    'a.json': 'done before',
    'b.json': 'done',
    'e.json': 'done before',
  }
  assert gpu.run_all(out, parts[2:3], limit=0) == {'c.json': 'no time left'}
  pid, last = int(child.read_text()), time.time() + 5
  while is_running(pid):  # what a part starts ends with it
    assert time.time() < last
    time.sleep(0.02)


def test_without_a_gpu_the_parts_are_shown(tmp_path):
  if gpu.has_gpu():
    pytest.skip('there is a GPU')
  done = subprocess.run(
    ['bash', pathlib.Path(gpu.__file__).with_name('gpu.sh')],
    env=os.environ | {'OUT': 'there'},
    cwd=tmp_path,
    check=True,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.stdout.startswith('no GPU here')
  for part in gpu.PARTS:
    assert part.command in done.stdout
  assert not list(tmp_path.iterdir())


@pytest.mark.in_turn
def test_training_suite(monkeypatch):
  tiny = dict(
    model=dict(d_model=16, num_layers=1, num_heads=2, dtype='float32')
  )
  tiny |= dict(batch_size=2, data=dict(seq_len=16))
  monkeypatch.setitem(training.SIZES, 'cpu', tiny)
  monkeypatch.setattr(training, 'MIXERS', ('attention', 'linear'))
  monkeypatch.setattr(training, 'matmul_ceiling', lambda *_: 1e9)
  found = training.measure(1)
  assert {name for name in found if name.startswith('linear')} == {
    'linear_peak_gib',
    'linear_step_ms',
    'linear_tokens_per_second',
    'linear_mfu',
  }
  for name in training.MIXERS:
    seconds = found[f'{name}_step_ms'] / 1e3
    assert found[f'{name}_tokens_per_second'] == pytest.approx(32 / seconds)
    flops = 1e9 * found[f'{name}_mfu'] * seconds
    # Six times the matrices and the logits for each token, and the mixing.
    matrices = 4 * 16 * 16 + 3 * 16 * 43 + 256 * 16
    assert 1 < flops / (6 * 32 * matrices) < 1.6


@pytest.mark.in_turn
def test_resume_suite(monkeypatch):
  changes = {
    'model': resume.VALUES['model'] | dict(d_model=16, pattern='linear')
  }
  monkeypatch.setattr(resume, 'VALUES', resume.VALUES | changes)
  monkeypatch.setattr(resume, 'STEPS', 2)
  monkeypatch.setattr(resume, 'STOP', 1)
  found = resume.measure(1)
  assert found['differ'] == 0 < found['parameters']


def test_resume_suite_finds_a_difference(monkeypatch):
  monkeypatch.setattr(resume, 'train', lambda workdir, steps: None)
  monkeypatch.setattr(
    resume,
    'parameters',
    lambda workdir: [np.array([1.0, float(workdir.name == 'part')])],
  )
  with pytest.raises(AssertionError, match="'parameters': 2, 'differ': 1"):
    resume.measure(1)
