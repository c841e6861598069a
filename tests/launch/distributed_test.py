"""Two processes, each with a device and its own rows, are one run."""

import re
import signal
import socket

import numpy as np
import pytest

from tests.launch.scripts import finish, losses, signal_after, train

FAST = '--config.model.pattern=attention', '--config.model.mixers={}'
RARE = '--config.checkpoint_every=80'


def train_in_two(workdir, *flags):
  """Starts two processes that find each other."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  return [
    train(
      workdir,
      *FAST,
      *flags,
      JAX_COORDINATOR_ADDRESS=f'localhost:{port}',
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]


@pytest.mark.in_turn
def test_two_processes(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish(train(one, *FAST, RARE, '--config.cpu_devices=2'))

  processes = train_in_two(two)
  # All stop after the same step, whichever gets the signal.
  signal_after(9, two, processes[1], signal.SIGTERM)
  (_, first), (_, second) = map(finish, processes)
  assert '2 cpu devices: data=2' in first
  stopped = int(
    re.search(
      r'stopped by a signal to another process after step (\d+); run the same '
      'command again',
      first,
    )[1]
  )
  assert stopped < 80
  assert list(losses(two)) == list(range(1, stopped + 1))
  assert 'step' not in second  # the first speaks for both

  _, err = finish(train(two, *FAST, '--config.cpu_devices=2'), code=2)
  assert err.startswith('error: the checkpoint') and err.count('\n') == 1
  assert err.endswith('there are 1; continue with 2\n')

  (_, first), (_, second) = map(finish, train_in_two(two, RARE))
  assert f'continues after step {stopped},' in first
  assert 'step' not in second

  # Each has sealed the arrays that it wrote.
  newest = two / 'checkpoints' / '80'
  names = {path.name for path in newest.glob('checksums*')}
  assert names == {'checksums.json', 'checksums.1.json'}

  # Either process reading the other's rows would change the losses.
  assert list(losses(two)) == list(losses(one)) == list(range(1, 81))
  np.testing.assert_allclose(
    list(losses(two).values()), list(losses(one).values()), rtol=1e-6, atol=1e-6
  )
