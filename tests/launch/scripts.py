"""The scripts of launch/ as processes, started as a user starts them."""

import argparse
import os
import pathlib
import runpy
import subprocess
import sys
import time

import jax

from efficient_attn.config import DataConfig
from efficient_attn.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / 'tests' / 'launch' / 'tiny.py'
TIMEOUT = 240  # seconds, of a machine that is busy with other tests


def start(script, *flags, **variables):
  """Starts a script; the variables are added to the environment."""
  env = os.environ | variables
  env.pop('PJRT_NPROC', None)  # the scripts see to it
  env['JAX_COMPILATION_CACHE_DIR'] = jax.config.jax_compilation_cache_dir
  return subprocess.Popen(
    [sys.executable, ROOT / 'launch' / script, *flags],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, code=0):
  """Waits for a process; returns its stdout and stderr."""
  try:
    out, err = process.communicate(timeout=TIMEOUT)
  finally:
    process.kill()
  assert process.returncode == code, err
  return out, err


def train(workdir, *flags, config=TINY, **variables):
  """Starts a training run."""
  return start(
    'train.py',
    f'--config={config}',
    f'--workdir={workdir}',
    *flags,
    **variables,
  )


def signal_after(step, workdir, process, number):
  """Sends a signal when a run has reported a step."""
  deadline = time.monotonic() + TIMEOUT
  while max((row['step'] for row in read_metrics(workdir)), default=0) < step:
    if process.poll() is not None or time.monotonic() > deadline:
      finish(process, code=None)  # fails and shows why
    time.sleep(0.01)
  process.send_signal(number)


def losses(workdir):
  """Returns the training losses by step; each step may occur once."""
  rows = [row for row in read_metrics(workdir) if 'train/loss' in row]
  found = {row['step']: row['train/loss'] for row in rows}
  assert len(found) == len(rows)
  return found


def sample(
  monkeypatch, capsys, model, *flags, name='lm', data='text', **options
):
  """Calls sample.py on a model that no run has trained.

  Options are those of its data. Returns the exit code, stdout and stderr.
  """
  config = argparse.Namespace(
    model=argparse.Namespace(name=name, vocab_size=256),
    data=DataConfig(name=data, **options),
  )
  if model is not None:
    config.model.vocab_size = model.embed.table.shape[0]
  monkeypatch.setattr(
    'efficient_attn.train.load.load_model', lambda workdir: (config, model)
  )
  argv = ['sample.py', '--workdir=x', '--prompt=ab', '--length=9', *flags]
  monkeypatch.setattr(sys, 'argv', argv)
  code = 0
  try:
    runpy.run_path(str(ROOT / 'launch' / 'sample.py'), run_name='__main__')
  except SystemExit as e:
    code = e.code
  return code, *capsys.readouterr()
