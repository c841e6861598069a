"""A run that was stopped, killed or broken ends like one that was not."""

import errno
import io
import json
import os
import shutil
import signal
import sys

import pytest

from efficient_attn import config_files
from efficient_attn.config import ConfigError
from efficient_attn.train import checkpoint, metrics, trainer, watch
from efficient_attn.train import workdir as folder
from efficient_attn.train.load import load_model
from efficient_attn.train.metrics import read_metrics
from efficient_attn.train.seal import CHECKSUMS
from efficient_attn.train.workdir import DiskError
from tests.train.tiny_runs import assert_same_parameters, contents, rows, run

pytestmark = pytest.mark.usefixtures('shared_programs')


def stop_after(monkeypatch, step):
  def requested(self, now):
    self.name = 'SIGTERM'
    return now == step

  monkeypatch.setattr(watch.StopSignal, 'requested', requested)


@pytest.mark.in_turn
@pytest.mark.parametrize('step', [2, 3, 6])
def test_a_stopped_run_has_the_same_rows(step, tmp_path, monkeypatch, whole):
  """Also where it stops at a validation, or between two rows."""
  with monkeypatch.context() as patch:
    stop_after(patch, step)
    assert run(tmp_path) == {}
  assert folder.checkpoint_steps(tmp_path)[-1] == step
  run(tmp_path)
  assert rows(tmp_path) == rows(whole)


def test_a_continued_run_has_no_more_rows(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    stop_after(patch, 4)
    run(tmp_path, log_every=3)
  run(tmp_path, log_every=3)
  train = [r['step'] for r in read_metrics(tmp_path) if 'train/loss' in r]
  assert train == [1, 3, 6]


def test_a_kill_during_validation_costs_no_row(tmp_path, monkeypatch, whole):
  with monkeypatch.context() as patch:
    evaluate = trainer.evaluate
    calls = []

    def killed(*args, **kw):
      calls.append(1)
      if len(calls) == 2:
        raise KeyboardInterrupt
      return evaluate(*args, **kw)

    patch.setattr(trainer, 'evaluate', killed)
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path)
  run(tmp_path)
  assert rows(tmp_path) == rows(whole)


def test_hanging_up_asks_to_stop_however_often():
  # The tests may run under nohup themselves.
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  try:
    with watch.StopSignal(1) as stop:
      for _ in range(3):  # of the terminal, and again of the shell
        os.kill(os.getpid(), signal.SIGHUP)
      assert stop.requested(1) and stop.name == 'SIGHUP'
  finally:
    signal.signal(signal.SIGHUP, before)


def test_nohup_is_left_alone():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with watch.StopSignal(1) as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.requested(1)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_readers_write_nothing(copy):
  (copy / 'checkpoints' / '4' / CHECKSUMS).unlink()
  (copy / 'checkpoints' / '9.orbax-checkpoint-tmp').mkdir()
  before = contents(copy)
  load_model(copy)
  assert contents(copy) == before


@pytest.mark.parametrize('moment', ['verify', '_shapes', 'load'])
def test_readers_of_a_run_that_goes_on(copy, whole, moment, monkeypatch, capfd):
  """The run replaces both checkpoints at any time while one is read."""
  where, name = checkpoint, moment
  if moment == 'load':
    where, name = checkpoint.ocp, 'load_checkpointables'
  real, calls = getattr(where, name), []

  def replaced(*args, **kw):
    calls.append(1)
    if len(calls) == 1:
      saved = copy / 'checkpoints'
      shutil.copytree(whole / 'checkpoints' / '6', saved / '6')
      for step in folder.checkpoint_steps(copy)[:-1]:
        checkpoint._remove(saved / str(step))
    return real(*args, **kw)

  monkeypatch.setattr(where, name, replaced)
  assert_same_parameters(copy, whole)
  assert 'warning' not in capfd.readouterr().err


def test_an_unsealed_checkpoint_counts_and_is_sealed(whole, tmp_path, capfd):
  """As two kills leave it, each before the checksums."""
  workdir = tmp_path / 'run'
  shutil.copytree(whole, workdir)
  for step in folder.checkpoint_steps(workdir):
    (workdir / 'checkpoints' / str(step) / CHECKSUMS).unlink()
  run(workdir, steps=7)
  assert 'continues after step 6' in capfd.readouterr().err
  assert folder.checkpoint_steps(workdir) == [6, 7]
  for step in (6, 7):
    sums = workdir / 'checkpoints' / str(step) / CHECKSUMS
    assert len(json.loads(sums.read_text())) > 5


@pytest.mark.parametrize('what', ['rows', 'events', 'config', 'plot'])
def test_a_full_disk_stops_the_run(what, tmp_path, monkeypatch, whole, capfd):
  full = OSError(errno.ENOSPC, 'No space left on device')
  calls = []

  def fail(*_, **__):
    calls.append(1)
    if what != 'events' or len(calls) > 20:
      raise full

  class Full(io.StringIO):
    def flush(self):
      if '"step": 3' in self.getvalue():
        fail()

  with monkeypatch.context() as patch:
    if what == 'rows':
      start = metrics.MetricWriter.__init__

      def started(self, *args):
        start(self, *args)
        self._file.close()
        self._file = Full()

      patch.setattr(metrics.MetricWriter, '__init__', started)
    elif what == 'events':
      patch.setattr(metrics.EventsWriter, 'write_event', fail)
    elif what == 'config':
      patch.setattr(config_files, 'save', fail)
    else:
      patch.setattr(trainer, 'plot_loss', fail)
    with pytest.raises(DiskError, match='No space left on device') as error:
      run(tmp_path)
  files = dict(
    rows='metrics.jsonl',
    events='tensorboard',
    config='config.json',
    plot='loss.png',
  )
  assert str(error.value).startswith(f'{tmp_path / files[what]}: ')
  assert '\n' not in str(error.value)
  run(tmp_path)
  assert_same_parameters(tmp_path, whole)


def test_other_errors_of_the_system_keep_their_traceback(tmp_path):
  with pytest.raises(FileNotFoundError), folder.clear_disk_faults(tmp_path):
    (tmp_path / 'none').read_text()


def test_a_terminal_that_has_gone_stops_nothing(tmp_path, monkeypatch, whole):
  class Gone(io.StringIO):
    def write(self, text):
      raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(sys, 'stderr', Gone())
  run(tmp_path)
  assert rows(tmp_path) == rows(whole)


@pytest.mark.parametrize('failed', [1, 4])
def test_an_error_of_the_data_loses_no_step(
  failed, tmp_path, monkeypatch, whole
):
  """Even if the iterator had moved on when it failed."""

  class BadRecordError(Exception):
    pass

  taken = []

  def fails(self):
    taken.append(1)
    if len(taken) == failed:
      next(self.iterator)
      raise BadRecordError
    return real(self)

  real = watch.Batches.__next__
  with monkeypatch.context() as patch:
    patch.setattr(watch.Batches, '__next__', fails)
    with pytest.raises(BadRecordError):
      run(tmp_path, checkpoint_every=0)
  done = [failed - 1] if failed > 1 else []
  assert folder.checkpoint_steps(tmp_path) == done
  run(tmp_path, checkpoint_every=0)
  assert rows(tmp_path) == rows(whole)
  assert_same_parameters(tmp_path, whole)


@pytest.mark.parametrize('content', ['{}', '[]', '', '{"a": 1}', '{"mod', '1'])
def test_a_damaged_config_is_one_line(copy, whole, content):
  (copy / 'config.json').write_text(content)
  for use in (run, load_model):
    with pytest.raises(
      ConfigError, match=r'config\.json cannot be rea'
    ) as error:
      use(copy)
    assert '\n' not in str(error.value)
  (copy / 'config.json').unlink()  # as the message says
  run(copy)
  assert_same_parameters(copy, whole)
