"""Files of PyTorch, written without PyTorch: a pickle and its storages."""

import pathlib
import pickle
import struct
import zipfile

import numpy as np


def value(x) -> bytes:
  """Returns the opcodes that build a constant."""
  if isinstance(x, bytes):  # opcodes already
    return x
  if isinstance(x, str):
    text = x.encode()
    return pickle.BINUNICODE + struct.pack('<I', len(text)) + text
  if isinstance(x, bool):
    return pickle.NEWTRUE if x else pickle.NEWFALSE
  if isinstance(x, int):
    return pickle.BININT + struct.pack('<i', x)
  if isinstance(x, tuple):
    return pickle.MARK + b''.join(map(value, x)) + pickle.TUPLE
  assert isinstance(x, dict)
  items = b''.join(value(key) + value(item) for key, item in x.items())
  return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS


def name(module: str, attribute: str) -> bytes:
  """Returns the opcode that looks up a global name."""
  return pickle.GLOBAL + f'{module}\n{attribute}\n'.encode()


def call(function: bytes, *args) -> bytes:
  """Returns the opcodes of a call."""
  return function + value(args) + pickle.REDUCE


def tensor(
  key: str,
  size: tuple[int, ...],
  stride: tuple[int, ...],
  offset: int = 0,
  *,
  count: int,
  storage: str = 'FloatStorage',
) -> bytes:
  """Returns the opcodes of a view of a storage of `count` elements."""
  place = ('storage', name('torch', storage), key, 'cpu', count)
  return call(
    name('torch._utils', '_rebuild_tensor_v2'),
    value(place) + pickle.BINPERSID,
    offset,
    size,
    stride,
    False,
    call(name('collections', 'OrderedDict')),
  )


def write(
  path: pathlib.Path,
  tree,
  storages: dict[str, np.ndarray],
  *,
  compression: int = zipfile.ZIP_STORED,
  byteorder: bytes = b'little',
) -> pathlib.Path:
  """Writes what `torch.save` does of a tree of opcodes or constants."""
  program = pickle.PROTO + b'\x02' + value(tree) + pickle.STOP
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', program)
    archive.writestr('archive/byteorder', byteorder)
    for key, array in storages.items():
      archive.writestr(f'archive/data/{key}', array.tobytes())
  return path


def save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
  """Writes contiguous float32 tensors."""
  tree, storages = {}, {}
  for i, (key, array) in enumerate(tensors.items()):
    storages[str(i)] = np.ascontiguousarray(array, np.float32)
    stride = tuple(s // 4 for s in storages[str(i)].strides)
    tree[key] = tensor(str(i), array.shape, stride, count=array.size)
  return write(path, tree, storages)
