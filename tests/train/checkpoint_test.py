"""Checkpoints that are damaged, incomplete, left over or too large to write."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import data
from efficient_attn.train import seal
from efficient_attn.train import workdir as folder
from efficient_attn.train.checkpoint import Checkpoints
from efficient_attn.train.seal import CHECKSUMS
from efficient_attn.train.state import TrainState
from efficient_attn.train.workdir import DiskError

CONFIG = configs.resolve(
  dict(model={}, data=dict(name='palindrome', options=dict(seq_len=8)))
)


def state(step):
  """Returns a state that says which one it is."""
  params = {'w': jax.random.normal(jax.random.key(step), (64, 64))}
  return TrainState(jnp.int32(step), params, {}, None, jax.random.key(0))


def abstract(one):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), one
  )


@pytest.fixture
def saved(tmp_path):
  """A folder with the checkpoints of steps 1 and 2."""
  checkpoints = Checkpoints(tmp_path, CONFIG)
  for step in (1, 2):
    checkpoints.save(step, state(step), batches())
  checkpoints.close()
  return tmp_path


def batches():
  return iter(data.load(CONFIG.data, batch_size=2).train)


def restored(workdir):
  """Returns the step that is restored, whose values are right."""
  found = Checkpoints(workdir, CONFIG).restore(abstract(state(0)), batches())
  step = int(found.step)
  np.testing.assert_array_equal(found.params['w'], state(step).params['w'])
  return step


def test_no_part_of_an_unsealed_checkpoint_may_be_missing(saved):
  path = saved / 'checkpoints' / '2'
  (path / CHECKSUMS).unlink()
  steps = {}
  for file in [p for p in path.rglob('*') if p.is_file()]:
    away = file.rename(saved / 'away')
    steps[str(file.relative_to(path))] = restored(saved)
    away.rename(file)
    (path / CHECKSUMS).unlink(missing_ok=True)
  assert {name for name, step in steps.items() if step == 1} >= {
    'dataset/process_0-of-1.json',
    'state/_METADATA',
    'state/manifest.ocdbt',
  }
  assert sum('/d/' in name and step == 1 for name, step in steps.items()) == 2
  assert restored(saved) == 2


@pytest.mark.parametrize('content', [b'[]', b'', b'\0' * 9, b'{"a"', b'\xff'])
def test_damaged_checksums_are_damage(saved, content, capfd):
  (saved / 'checkpoints' / '2' / CHECKSUMS).write_bytes(content)
  assert restored(saved) == 1
  err = capfd.readouterr().err
  assert f'damaged ({CHECKSUMS} is unreadable)' in err
  assert err.startswith('warning: ') and err.count('\n') == 1


def test_every_flipped_byte_of_a_file_is_noticed(saved, capfd):
  path = saved / 'checkpoints' / '2'
  for name in seal._files(path):
    content = (path / name).read_bytes()
    if not content:
      continue
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    (path / name).write_bytes(
      content[:middle] + flipped + content[middle + 1 :]
    )
    assert restored(saved) == 1
    assert f'{name} has changed' in capfd.readouterr().err
    (path / name).write_bytes(content)
  assert restored(saved) == 2


def test_each_process_seals_what_it_wrote(saved, monkeypatch):
  path = saved / 'checkpoints' / '2'
  own = path / 'state' / 'ocdbt.process_0'
  shutil.copytree(own, own.with_name('ocdbt.process_1'))
  (path / CHECKSUMS).unlink()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  seal.seal(path)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  seal.seal(path)
  first, second = (
    json.loads((path / name).read_text()).keys()
    for name in (CHECKSUMS, 'checksums.1.json')
  )
  assert not first & second and first | second == set(seal._files(path))
  assert all(name.startswith('state/ocdbt.process_1/') for name in second)
  assert len(second) == 2


def test_leftovers_of_kills_go(saved):
  for name in ('3.orbax-checkpoint-tmp', '1.deleted'):
    (saved / 'checkpoints' / name).mkdir()
  assert restored(saved) == 2
  names = {path.name for path in (saved / 'checkpoints').iterdir()}
  assert names == {'1', '2'}


def test_a_checkpoint_that_cannot_be_written(saved, capfd):
  """A limit on the size of files stands for a disk that is full."""
  checkpoints = Checkpoints(saved, CONFIG)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
  try:
    with pytest.raises(DiskError, match='checkpoints/3: File too large; .* 2'):
      with folder.clear_disk_faults(saved):
        checkpoints.save(3, state(3), batches())
        checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  checkpoints.save(3, state(3), batches())
  checkpoints.close()
  assert restored(saved) == 3
  assert 'Traceback' not in capfd.readouterr().err
