"""Files of PyTorch are read as tensors, and as nothing else."""

import pickle
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from efficient_attn.config import ConfigError
from efficient_attn.interop.torch_file import open_torch_file
from tests.interop import torch_archive as archive

DATA = {'0': np.arange(12, dtype=np.float32), '1': np.arange(6, dtype=np.int16)}
WHOLE = archive.tensor('0', (3, 4), (4, 1), count=12)


def test_views_of_storages(tmp_path):
  file = archive.write(
    tmp_path / 'x.bin',
    {
      'step': 5,
      'model': {
        'a': WHOLE,
        'turned': archive.tensor('0', (4, 2), (1, 4), 4, count=12),
        'one': archive.tensor('0', (), (), 7, count=12),
        'none': archive.tensor('0', (0, 3), (3, 1), count=12),
        'half': archive.tensor(
          '1', (6,), (1,), count=6, storage='BFloat16Storage'
        ),
      },
    },
    DATA,
  )
  found = open_torch_file(file)
  a = DATA['0'].reshape(3, 4)
  wanted = {
    'model.a': a,
    'model.turned': a[1:].T,
    'model.one': a[1, 3],
    'model.none': np.zeros((0, 3), np.float32),
    'model.half': DATA['1'].view(ml_dtypes.bfloat16),
  }
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    assert found[name].path == file
    assert found[name].shape == np.shape(value)
    np.testing.assert_array_equal(found[name].map(), value, strict=True)
    assert not found[name].map().flags.writeable


def nested(depth):
  """A dictionary in each of whose levels the next is there twice."""
  program = archive.value({'a': WHOLE})
  for i in range(depth):
    keep = pickle.BINPUT + bytes([i])
    again = pickle.BINGET + bytes([i])
    program = archive.value({'x': program + keep, 'y': again})
  return program


def holds_itself():
  keep, again = pickle.BINPUT + b'\0', pickle.BINGET + b'\0'
  pair = archive.value('x') + again + pickle.SETITEM
  return pickle.EMPTY_DICT + keep + pair


def view(size, stride, offset=0, **options):
  return {'a': archive.tensor('0', size, stride, offset, count=12, **options)}


SYSTEM = archive.name('os', 'system')
BAD = {
  'a call': ({'a': archive.call(SYSTEM, 'touch called')}, 'os.system'),
  'a name': ({'a': archive.name('builtins', 'eval')}, 'builtins.eval'),
  'another of torch': ({'a': archive.name('torch', 'load')}, 'torch.load'),
  'an old call': (
    pickle.MARK + archive.value('touch called') + b'ios\nsystem\n',
    'KeyError',
  ),
  'a name by strings': (
    archive.value('os') + archive.value('system') + pickle.STACK_GLOBAL,
    'KeyError',
  ),
  'an extension': (pickle.EXT1 + b'\1', 'KeyError'),
  'a frame': (pickle.FRAME + struct.pack('<Q', 2**62), 'KeyError'),
  'bytes': (pickle.BINBYTES8 + struct.pack('<Q', 2**62), 'KeyError'),
  'a memo without end': (
    pickle.EMPTY_DICT + pickle.LONG_BINPUT + b'\xff' * 4 + pickle.EMPTY_LIST,
    'list',
  ),
  'a tensor alone': (WHOLE, 'ndarray'),
  'nothing': (b'', 'cannot be read'),
  'a larger storage': ({'a': archive.tensor('0', (3,), (1,), count=13)}, '48'),
  'another width': (view((3,), (1,), storage='DoubleStorage'), '48'),
  'no such storage': ({'a': archive.tensor('9', (), (), count=1)}, 'data/9'),
  'behind its end': (view((3, 4), (4, 1), 1), 'ends behind'),
  'a long step': (view((2,), (12,)), 'ends behind'),
  'a step back': (view((2,), (-1,)), 'no tensor'),
  'before its start': (view((2,), (1,), -1), 'no tensor'),
  'axes without steps': (view((3, 4), (1,)), 'no tensor'),
  'a tensor of no storage': (
    {
      'a': archive.call(
        archive.name('torch._utils', '_rebuild_tensor_v2'), 1, 2, (), ()
      )
    },
    'storage',
  ),
  'another state': (
    {'a': WHOLE + archive.value((1, (2,), 3)) + pickle.BUILD},
    'cannot be read',
  ),
  'billions of names': (nested(60), 'several places'),
  'itself': (holds_itself(), 'several places'),
}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_tensor_is_refused(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  tree, said = BAD[name]
  file = archive.write(tmp_path / 'x.bin', tree, DATA)
  with pytest.raises(ConfigError, match=said) as error:
    open_torch_file(file)
  assert str(file) in str(error.value)
  assert '\n' not in str(error.value)
  assert [x.name for x in tmp_path.iterdir()] == ['x.bin']


def cut(path):
  path.write_bytes(path.read_bytes()[:-40])


def rewritten(**options):
  return lambda path: archive.write(path, {'a': WHOLE}, DATA, **options)


def twice(path):
  with zipfile.ZipFile(path, 'a') as file:
    file.writestr('other/data.pkl', b'')


def other(path):
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('readme', b'')


FILES = {
  'cut': (cut, 'no zip archive'),
  'old': (lambda path: path.write_bytes(b'\x80\x02\x8a\nl\xfc'), 'PyTorch 1.6'),
  'missing': (lambda path: path.unlink(), 'No such file'),
  'compressed': (rewritten(compression=zipfile.ZIP_DEFLATED), 'compressed'),
  'big-endian': (rewritten(byteorder=b'big'), 'big-endian'),
  'two': (twice, '2 members'),
  'another': (other, '0 members'),
}


@pytest.mark.parametrize('name', FILES)
def test_bad_files_are_refused(name, tmp_path):
  file = archive.write(tmp_path / 'x.bin', {'a': WHOLE}, DATA)
  change, said = FILES[name]
  change(file)
  with pytest.raises(ConfigError, match=said):
    open_torch_file(file)


def test_damaged_files_are_read_or_refused(tmp_path):
  raw = archive.write(tmp_path / 'x.bin', {'a': {'b': WHOLE}}, DATA)
  raw = raw.read_bytes()
  draw, refused = random.Random(0), 0
  for _ in range(500):
    damaged = bytearray(raw)
    for _ in range(draw.choice((1, 3, 10))):
      damaged[draw.randrange(len(raw))] = draw.randrange(256)
    (tmp_path / 'y.bin').write_bytes(damaged)
    try:
      for tensor in open_torch_file(tmp_path / 'y.bin').values():
        tensor.map().sum()
    except ConfigError:
      refused += 1
  assert 100 < refused < 500
