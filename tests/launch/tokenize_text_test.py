"""tokenize_text.py writes what a config reads, and says what it did."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from efficient_attn import data
from efficient_attn.config import DataConfig
from launch import tokenize_text

SCRIPT = pathlib.Path(tokenize_text.__file__)


def _call(monkeypatch, capsys, *flags):
  """Returns the exit code, stdout and stderr."""
  monkeypatch.setattr(sys, 'argv', ['tokenize_text.py', *flags])
  code = 0
  try:
    tokenize_text.main()
  except SystemExit as error:
    code = error.code
  return code, *capsys.readouterr()


@pytest.fixture
def text(tmp_path):
  for i in range(30):
    (tmp_path / f'{i:02}.txt').write_text(f'text {i}\n' * 20)
  return str(tmp_path / '*.txt')


@pytest.mark.parametrize('config', [False, True])
def test_flags_and_configs(text, tmp_path, monkeypatch, capsys, config):
  out = str(tmp_path / 'a.tokens')
  flags = [f'--path={text}', '--tokenizer=bytes']
  if config:
    flags = ['--config=configs/lm/quickstart.py', f'--config.data.path={text}']
    monkeypatch.chdir(SCRIPT.parents[1])
  flags += [f'--out={out}', '--config.data.valid_every=4', '--workers=1']
  code, said, _ = _call(monkeypatch, capsys, *flags)
  assert code == 0
  assert said == (
    f'{out} is complete: 30 documents, 4,600 tokens, 4,600 bytes of text\n'
  )
  _, said, err = _call(monkeypatch, capsys, *flags)
  assert 'was complete already' in said and not err
  config = DataConfig(path=out, valid_every=4, seq_len=16)
  assert next(iter(data.load(config, batch_size=2).train))['tokens'].any()


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--out=a.tokens'], '--path or --config is required'),
    (['--out=a', '--path={}'], "error: --out='a' must end in .tokens, as a.t"),
    (['--out=a.tokens', '--path=no.txt'], "error: data.path='no.txt': no such"),
    (
      ['--out=a.tokens', '--path={}', '--workers=0'],
      'error: --workers=0 must be at least 1',
    ),
    (
      ['--out=a.tokens', '--path={}', '--config.data.name=digits'],
      "error: data.name='digits' is no text",
    ),
    (['--out=a.tokens', '--pat=x', '--x=3'], 'error: --x=3: unknown flag'),
  ],
)
def test_mistakes_are_one_line(
  text, flags, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  flags = [flag.format(text) for flag in flags]
  code, out, err = _call(monkeypatch, capsys, *flags)
  assert code == 2 and not out and message in err
  assert not (tmp_path / 'a.tokens').exists()


def test_no_script_hides_a_module_of_python():
  """The folder of a script is the first that Python imports from."""
  scripts = {file.stem for file in SCRIPT.parent.glob('*.py')}
  assert not scripts & set(sys.stdlib_module_names)


@pytest.mark.in_turn
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no /proc')
def test_workers_end_with_a_killed_parent(tmp_path):
  for i in range(3):  # files that take long
    with open(tmp_path / f'{i}.txt', 'wb') as file:
      file.truncate(2**29)
  env = os.environ | {'PYTHONPATH': str(SCRIPT.parents[1])}
  flags = [f'--path={tmp_path}/*.txt', '--workers=2']
  with subprocess.Popen(
    [sys.executable, SCRIPT, f'--out={tmp_path}/a.tokens', *flags],
    env=env,
    stderr=subprocess.DEVNULL,
  ) as process:
    try:
      deadline = time.monotonic() + 60
      while len(workers := _children(process.pid)) < 3:  # and a tracker
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    finally:
      process.send_signal(signal.SIGKILL)
  try:
    deadline = time.monotonic() + 20
    while any(map(_runs, workers)) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not any(map(_runs, workers))
  finally:
    for pid in filter(_runs, workers):
      os.kill(pid, signal.SIGKILL)


def _children(pid):
  return [
    int(file.parent.name)
    for file in pathlib.Path('/proc').glob('[0-9]*/stat')
    if _stat(file)[1:2] == [str(pid)]
  ]


def _runs(pid):
  return _stat(pathlib.Path(f'/proc/{pid}/stat'))[:1] not in ([], ['Z'])


def _stat(file):
  """Returns the state, the parent and so on of a process."""
  try:
    return file.read_text().rpartition(')')[2].split()
  except (FileNotFoundError, ProcessLookupError):
    return []
