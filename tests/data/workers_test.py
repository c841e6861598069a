"""Worker processes end with the process that they work for."""

import os
import signal
import subprocess
import sys
import time

import pytest

TRAINER = """
import multiprocessing, time
from efficient_attn import data
from efficient_attn.config import DataConfig

if __name__ == '__main__':
  config = DataConfig(path={path!r}, seq_len=16, workers=1)
  batches = iter(data.load(config, batch_size=4).train)
  next(batches)
  print(*(p.pid for p in multiprocessing.active_children()), flush=True)
  time.sleep(600)
"""


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no /proc')
def test_workers_end_with_a_killed_trainer(tmp_path):
  (tmp_path / 'a.txt').write_text('text\n' * 1000)
  script = tmp_path / 'trainer.py'
  script.write_text(TRAINER.format(path=str(tmp_path / 'a.txt')))
  env = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  with subprocess.Popen(
    [sys.executable, script], stdout=subprocess.PIPE, text=True, env=env
  ) as trainer:
    try:
      workers = list(map(int, trainer.stdout.readline().split()))
    finally:
      trainer.kill()
  try:
    assert workers
    deadline = time.monotonic() + 10
    while any(map(_runs, workers)) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not any(map(_runs, workers))
  finally:
    for pid in filter(_runs, workers):
      os.kill(pid, signal.SIGKILL)


def _runs(pid):
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rpartition(')')[2].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False
