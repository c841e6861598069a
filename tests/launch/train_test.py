"""Training and sampling as a user starts, stops, breaks and mistypes them."""

import json
import re
import runpy
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from efficient_attn import cli
from efficient_attn.train.load import load_model
from efficient_attn.train.seal import CHECKSUMS
from tests.launch.scripts import (
  ROOT,
  TINY,
  finish,
  losses,
  signal_after,
  start,
  train,
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that nobody interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  _, err = finish(train(workdir))
  assert 'starts, 80 steps' in err and 'Traceback' not in err
  return workdir


def checkpoints(workdir):
  """Returns the steps with a complete checkpoint."""
  found = (workdir / 'checkpoints').glob(f'*/{CHECKSUMS}')
  return sorted(int(path.parent.name) for path in found)


def assert_same_parameters(a, b):
  (_, a), (_, b) = load_model(a), load_model(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.in_turn
def test_interrupted_run_ends_like_an_uninterrupted_one(whole, tmp_path):
  workdir = tmp_path / 'run'
  # Relaunched from the saved config of the other.
  process = train(workdir, config=whole / 'config.json')
  signal_after(9, workdir, process, signal.SIGKILL)
  finish(process, code=-signal.SIGKILL)
  assert 4 <= checkpoints(workdir)[-1] < 80

  for after, number in ((25, signal.SIGTERM), (40, signal.SIGINT)):
    before = checkpoints(workdir)[-1]
    process = train(workdir)
    signal_after(after, workdir, process, number)
    _, err = finish(process)
    # The kill may have left a checkpoint without its checksums, which counts.
    continued = int(re.search(r'continues after step (\d+),', err)[1])
    assert continued in (before, before + 4)
    name, step, where = re.search(
      r'stopped by (\w+) after step (\d+); run the same command again to '
      r'continue from (.*)',
      err,
    ).groups()
    assert (name, where) == (signal.Signals(number).name, str(workdir))
    assert checkpoints(workdir)[-1] == int(step) < 80
    assert list(losses(workdir)) == list(range(1, int(step) + 1))
    assert 'Traceback' not in err

  finish(train(workdir))
  assert losses(workdir) == losses(whole)
  assert list(losses(workdir)) == list(range(1, 81))
  assert_same_parameters(workdir, whole)
  assert (workdir / 'config.json').read_text() == (
    whole / 'config.json'
  ).read_text()


@pytest.mark.in_turn
def test_a_killed_run_of_new_parts_ends_like_a_whole_one(tmp_path):
  """Adapters, groups, a teacher, another run's weights, a masked mixture."""
  for name in 'ab':
    lines = [json.dumps({'text': name * (20 + i)}) for i in range(60)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  first = {
    'steps': 40,
    'model.name': 'encoder',
    'model.vocab_size': 257,
    'data.corruption': 'mask',
    'data.mixture.a.path': tmp_path / 'a.jsonl',
    'data.mixture.a.weight': 0.7,
    'data.mixture.b.path': tmp_path / 'b.jsonl',
    'data.mixture.b.weight': 0.3,
  }
  second = first | {
    'init_from.run': tmp_path / 'first',
    'teacher.run': tmp_path / 'first',
    'lora.rank': 2,
    'optimizer.groups.norms.match': '*norm.scale',
    'optimizer.groups.norms.learning_rate': 1e-3,
  }

  def run(name, changes):
    flags = (f'--config.{key}={value}' for key, value in changes.items())
    return train(tmp_path / name, *flags)

  finish(run('first', first))
  finish(run('whole', second))
  process = run('killed', second)
  signal_after(9, tmp_path / 'killed', process, signal.SIGKILL)
  finish(process, code=-signal.SIGKILL)
  finish(run('killed', second))
  assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
  assert_same_parameters(tmp_path / 'killed', tmp_path / 'whole')


@pytest.mark.in_turn
def test_damaged_checkpoints_are_replaced(whole, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(whole, workdir)
  (workdir / 'checkpoints' / '80' / CHECKSUMS).write_text('[]')
  # Also a save before the damaged step must succeed.
  _, err = finish(train(workdir, '--config.checkpoint_every=39'))
  assert err.startswith('warning: checkpoint ') and 'continues after' in err
  assert checkpoints(workdir) == [78, 80]
  assert_same_parameters(workdir, whole)


def test_an_interrupt_before_the_loop_is_one_line(tmp_path):
  config = tmp_path / 'config.py'
  config.write_text(
    'import os, signal\n'
    'def get_config(arg):\n'
    '  os.kill(os.getpid(), signal.SIGINT)\n'
  )
  out, err = finish(train(tmp_path / 'run', config=config), code=130)
  assert (out, err.count('\n')) == ('', 1)
  assert err.startswith('interrupted; run the same command again')


@pytest.fixture
def call(monkeypatch, capsys):
  """Runs a script in this process; returns its exit code and output."""
  monkeypatch.setattr(cli, 'start_devices', lambda config: None)

  def run(script, *flags):
    monkeypatch.setattr(sys, 'argv', [script, *flags])
    try:
      runpy.run_path(str(ROOT / 'launch' / script), run_name='__main__')
      code = 0
    except SystemExit as e:
      code = e.code
    return code, *capsys.readouterr()

  return run


@pytest.mark.in_turn
def test_sample(whole, call):
  flags = [f'--workdir={whole}', '--prompt=import ', '--length=12']
  out, err = finish(start('sample.py', *flags, '--seed=3'))
  text = out.rpartition('\n\n')[0]  # the last line is about time
  assert text.startswith('import ') and len(text) > len('import ')
  assert 'Traceback' not in err
  code, again, _ = call('sample.py', *flags, '--seed=3')
  assert code == 0 and again.rpartition('\n\n')[0] == text
  code, other, _ = call('sample.py', *flags, '--seed=4')
  assert code == 0 and other.rpartition('\n\n')[0] != text
  code, out, err = call('sample.py', f'--workdir={whole}', '--prompt=')
  assert (code, out) == (2, '')
  assert err == 'error: --prompt is empty; give at least one token\n'


def test_sample_without_a_run(whole, call, tmp_path):
  code, out, err = call('sample.py', f'--workdir={tmp_path}')
  assert (code, out) == (2, '')
  assert err == (f"error: --workdir='{tmp_path}': no run there (config.json)\n")
  shutil.copy(whole / 'config.json', tmp_path)
  code, out, err = call('sample.py', f'--workdir={tmp_path}')
  assert (code, out) == (2, '')
  assert err == f"error: --workdir='{tmp_path}': the run has no checkpoint\n"


@pytest.mark.parametrize(
  'flags,message',
  [
    (
      '--config.model.d_modle=32',
      "model.d_modle='32' is not a known key; did you mean 'd_model'?",
    ),
    (
      '--config.stesp=32',
      "stesp='32' is not a known key; did you mean 'steps'?",
    ),
    (
      '--config.steps=many',
      "steps='many' is a str; it must be of type int",
    ),
    (
      '--config.model.num_layers=1.5',
      'model.num_layers=1.5 is a float; it must be of type int',
    ),
    (
      '--config.data=text',
      "data='text' must be a group of keys",
    ),
    (
      '--config.model.d_model=18',
      'model.d_model=18 is not divisible by model.num_heads=4; '
      'nearest: [16, 20]',
    ),
    (
      '--config.model.pattern=gla,attentoin --config.model.mixers={}',
      "'attentoin' is unknown; did you mean 'attention'?",
    ),
    (
      '--config.model.mixers.gla.chunk_szie=8',
      "did you mean 'chunk_size'?",
    ),
    (
      '--config.optimizer.name=adamv',
      "optimizer.name='adamv' is unknown; did you mean 'adamw'?",
    ),
    (
      '--config.data.path=no.txt',
      "data.path='no.txt': no such file",
    ),
    (
      '--config.batch_size=9 --config.accumulate=2',
      'batch_size=9 is not divisible by accumulate=2',
    ),
    (
      '--config.batch_size=12',
      'batch_size=12 over accumulate=1 is 12 rows, '
      'which data x fsdp = 8 devices do not divide',
    ),
    (
      '--config.mesh=tenser=2',
      "mesh='tenser=2': unknown axis 'tenser'; did you mean 'tensor'?",
    ),
    (
      '--steps=3',
      '--steps=3: unknown flag; a key is set by --config.key=value',
    ),
    (
      '--config.steps 3',
      '--config.steps: unknown flag; a key is set by --config.key=value',
    ),
    (
      '--config=tests/launch/tniy.py',
      "'tests/launch/tniy.py': no such file; did you mean 'tiny.py'?",
    ),
  ],
)
def test_mistakes_are_one_line(flags, message, call, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  code, out, err = call(
    'train.py',
    f'--workdir={tmp_path / "run"}',
    f'--config={TINY}',
    *flags.split(),
  )
  assert (code, out) == (2, '')
  assert err.startswith('error: ') and message in err
  assert err.count('\n') == 1


def test_mistake_ends_the_process(tmp_path):
  out, err = finish(train(tmp_path / 'run', '--config.sed=1'), code=2)
  assert out == ''
  assert err == "error: sed='1' is not a known key; did you mean 'seed'?\n"
  assert not (tmp_path / 'run').exists()
