"""Which runs a folder may continue, and which are refused in one line."""

import dataclasses
import errno
import fcntl
import json
import pathlib
import shutil

import jax
import pytest

from efficient_attn import config as configs
from efficient_attn import data, formats
from efficient_attn.config import ConfigError
from efficient_attn.train import trainer, watch
from efficient_attn.train import workdir as folder
from efficient_attn.train.checkpoint import Checkpoints
from efficient_attn.train.load import load_model
from tests.train.tiny_runs import (
  TINY,
  assert_same_parameters,
  contents,
  rows,
  run,
  tiny,
)

pytestmark = pytest.mark.usefixtures('shared_programs')


def assert_refused(workdir, message, **changes):
  """Asserts one line, and that a refused run leaves the folder as it was."""
  before = contents(workdir)
  with pytest.raises(ConfigError, match=message) as error:
    run(workdir, **changes)
  assert '\n' not in str(error.value)
  assert contents(workdir) == before


def test_the_same_command_continues(copy, whole):
  run(copy)
  assert rows(copy) == rows(whole)
  assert_same_parameters(copy, whole)


@pytest.mark.parametrize(
  'before,now,same',
  [
    ({'a': (1, (2, 3))}, {'a': [1, [2, 3]]}, True),
    ({'a': float('nan')}, {'a': float('nan')}, True),
    ({1: 'x', 'b': 0.1}, {'b': 0.1, '1': 'x'}, True),
    ({'a': 1e-7}, {'a': 0.0000001}, True),
    ({'a': 1}, {'a': 2}, False),
    ({'a': True}, {'a': 1}, False),
    ({'a': 1}, {}, False),
  ],
)
def test_configs_are_compared_as_json(before, now, same):
  assert (not list(folder.differences(before, now, 'data'))) == same


def test_the_key_that_differs_is_named(copy):
  with pytest.raises(ConfigError, match=r'data\.options\.segments=.* began'):
    run(copy, **{'data.options.segments': ((16, 2, 1),)})


def test_a_folder_with_a_colon(whole, tmp_path):
  workdir = tmp_path / '2026-11-27_12:30'
  shutil.copytree(whole, workdir)
  run(workdir)
  assert_same_parameters(workdir, whole)


def test_home_is_expanded(monkeypatch):
  monkeypatch.setenv('HOME', '/home/someone')
  assert folder.resolve('~/runs') == pathlib.Path('/home/someone/runs')
  with pytest.raises(ConfigError, match='no such user'):
    folder.resolve('~nobody-of-that-name/runs')


@pytest.mark.parametrize('workdir', ['gs://bucket/run', 's3://bucket/run'])
def test_object_stores_are_refused(workdir, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for use in (run, load_model):
    for form in (workdir, pathlib.Path(workdir)):
      with pytest.raises(ConfigError, match='object stores are not supported'):
        use(form)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('below', ['', 'run'])
def test_a_folder_that_is_a_file(below, tmp_path):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(ConfigError, match='give a folder that can be written'):
    run(file / below)


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      {'optimizer.name': 'lion'},
      "another optimizer: .*optimizer.name='lion' and not 'adamw'",
    ),
    (
      {'optimizer.clip_norm': 0.0},
      r'another optimizer: .*optimizer\.clip_norm=0\.0 and not 1\.0',
    ),
    ({'ema': 0.9}, r'another average: ema\..* absent there .*ema=0\.9'),
    ({'model.d_model': 16}, r'another model: .*model\.d_model=16 and not 8'),
  ],
  ids=str,
)
def test_another_state_is_refused(whole, changes, message):
  assert_refused(whole, message, **changes)


def test_fewer_steps_are_refused(whole):
  assert_refused(whole, r'steps=3 but the run in .* has done 6', steps=3)


def with_data(monkeypatch, **changes):
  load = data.load
  monkeypatch.setattr(
    data,
    'load',
    lambda *args, **kw: dataclasses.replace(load(*args, **kw), **changes),
  )


def test_data_that_changed_is_refused(tmp_path, monkeypatch):
  with_data(monkeypatch, fingerprint='a')
  run(tmp_path, steps=2)
  with_data(monkeypatch, fingerprint='b')
  assert_refused(tmp_path, r'data has changed .*\(fingerprint b, then a\)')
  load_model(tmp_path)


def test_checkpoints_without_a_fingerprint_continue(tmp_path, monkeypatch):
  with_data(monkeypatch, fingerprint='')
  run(tmp_path, steps=2)
  with_data(monkeypatch, fingerprint='a')
  assert run(tmp_path, steps=2)


def test_one_run_at_a_time(copy, whole):
  with (copy / '.lock').open('a') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    assert_refused(copy, 'another process trains there')
    load_model(copy)
  run(copy)
  assert rows(copy) == rows(whole)


def test_a_file_system_without_locks(copy, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  assert run(copy)


def without_targets(monkeypatch, split):
  """Gives no weight to anything in a split."""
  load = data.load

  def loaded(*args, **kw):
    dataset = load(*args, **kw)
    empty = getattr(dataset, split).map(
      lambda batch: batch | {'weights': 0 * batch['weights']}
    )
    return dataclasses.replace(dataset, **{split: empty})

  monkeypatch.setattr(data, 'load', loaded)


def test_training_without_targets_is_an_error(tmp_path, monkeypatch):
  without_targets(monkeypatch, 'train')
  with pytest.raises(ConfigError, match='no batch of the last 6 steps has a'):
    run(tmp_path, eval_every=0)


def test_validation_without_targets_is_an_error(tmp_path, monkeypatch):
  without_targets(monkeypatch, 'valid')
  with pytest.raises(ConfigError, match='validation set has no target'):
    run(tmp_path, checkpoint_every=0)
  assert folder.checkpoint_steps(tmp_path) == [2]  # nothing is lost


def test_documents_of_one_token_have_no_target(tmp_path):
  text = {'data': dict(seq_len=1, packing='segments'), 'model.vocab_size': 257}
  (tmp_path / 'a.txt').write_text('some text of a few words\n' * 100)
  text['data'] |= dict(path=str(tmp_path / 'a.txt'), valid_every=2)
  values = {k: v for k, v in TINY.items() if k != 'data'}
  config = configs.resolve(configs.override(values, text))
  with pytest.raises(ConfigError, match='no batch of the last 6 steps has a'):
    trainer.run(config, tmp_path / 'run', jax.devices()[:1])


def test_a_batch_without_targets_may_come(tmp_path):
  checkpoints = Checkpoints(tmp_path, tiny())
  guard = watch.StepGuard(tiny(steps=100), checkpoints)
  for step in range(30):
    guard.remember(step, {})
    weight = float(step % 10 == 9)
    guard.check(step, dict(finite=1.0, weight=weight, loss=0.0, grad_norm=0.0))


def test_a_model_larger_than_the_machine(tmp_path):
  with pytest.raises(ConfigError, match='take .* GiB on the devices') as error:
    run(tmp_path / 'run', **{'model.vocab_size': 2**31 - 1})
  assert '\n' not in str(error.value)


def test_a_default_that_changed_since_is_named(copy, monkeypatch):
  implied = {'attention': dict(logits_soft_cap=5.0)}
  monkeypatch.setitem(formats.IMPLIED, 2, implied)
  file = copy / 'config.json'
  stored = json.loads(file.read_text())
  del stored['model']['mixers']['attention']['logits_soft_cap']
  file.write_text(json.dumps(stored | {'format': 1}))
  key = 'model.mixers.attention.logits_soft_cap'
  assert_refused(copy, f'{key}=None but .* began with 5.0.* --config.{key}=5.0')
  run(copy, **{key: 5.0})
