"""Tensors of PyTorch's own files, read without running what they hold.

state-spaces/mamba and RWKV-7 are published as `.bin` and `.pth`: a zip archive
of one pickle, which says what there is, and one member of raw bytes a storage.
A pickle is a program. This one may build dictionaries, lists, numbers, strings
and views of the archive, and call nothing else.
"""

import collections
import math
import mmap
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from efficient_attn.config import ConfigError

# By the name of the storage's class in torch.
_DTYPES = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}
_LOCAL_HEADER = 30  # bytes before a member's name


class TorchTensor(NamedTuple):
  """A tensor of a file, whose bytes are read when they are used.

  Attributes:
    path: of the file.
    array: a view of it, in memory as far as it was read.
  """

  path: pathlib.Path
  array: np.ndarray

  @property
  def dtype(self) -> np.dtype:
    """Returns its dtype."""
    return self.array.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns its shape."""
    return self.array.shape

  def map(self) -> np.ndarray:
    """Returns the view, as `files.Tensor` does."""
    return self.array


def open_torch_file(path: pathlib.Path) -> dict[str, TorchTensor]:
  """Returns the tensors of a file by name.

  A dictionary in the dictionary, as of a training checkpoint, gives names
  joined by dots; what is no tensor, as a number of steps, is left out.

  Raises:
    ConfigError: the file is damaged, older than the zip format of PyTorch 1.6,
      or asks for more than tensors and dictionaries.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      tree = _unpickle(path, archive)
    if not isinstance(tree, Mapping):
      raise ConfigError(
        f'{path} holds one {type(tree).__name__}, not a dictionary of tensors'
      )
    found = dict(_tensors(tree, set()))
    return {name: TorchTensor(path, x) for name, x in found.items()}
  except zipfile.BadZipFile:
    raise ConfigError(
      f'{path} is no zip archive of PyTorch: it is damaged, or older than '
      'PyTorch 1.6; save it again as safetensors'
    ) from None
  except ConfigError:
    raise
  except _BROKEN as e:
    reason = f'{type(e).__name__}: {e}'
    raise ConfigError(f'{path} cannot be read; {reason}') from None


# What reading a damaged archive or pickle can raise.
_BROKEN = (
  pickle.UnpicklingError,
  OSError,
  RuntimeError,
  EOFError,
  AttributeError,
  ImportError,
  IndexError,
  KeyError,
  OverflowError,
  TypeError,
  ValueError,
  struct.error,
)

# The opcodes of which `torch.save` makes use. Python's own reader in Python
# looks them up in a table; that in C takes others, too, such as one that asks
# for any amount of memory.
_OPCODES = (
  pickle.APPEND,
  pickle.APPENDS,
  pickle.BINFLOAT,
  pickle.BINGET,
  pickle.BININT,
  pickle.BININT1,
  pickle.BININT2,
  pickle.BINPERSID,
  pickle.BINPUT,
  pickle.BINUNICODE,
  pickle.BUILD,
  pickle.EMPTY_DICT,
  pickle.EMPTY_LIST,
  pickle.EMPTY_TUPLE,
  pickle.GLOBAL,
  pickle.LONG1,
  pickle.LONG_BINGET,
  pickle.LONG_BINPUT,
  pickle.MARK,
  pickle.NEWFALSE,
  pickle.NEWTRUE,
  pickle.NONE,
  pickle.PROTO,
  pickle.REDUCE,
  pickle.SETITEM,
  pickle.SETITEMS,
  pickle.STOP,
  pickle.TUPLE,
  pickle.TUPLE1,
  pickle.TUPLE2,
  pickle.TUPLE3,
)


def _unpickle(path: pathlib.Path, archive: zipfile.ZipFile):
  """Builds what the pickle of the archive describes."""
  names = [n for n in archive.namelist() if n.endswith('/data.pkl')]
  if len(names) != 1:
    raise ConfigError(
      f'{path} is a zip archive but not of PyTorch: it has {len(names)} '
      'members data.pkl'
    )
  root = names[0].removesuffix('data.pkl')
  for info in archive.infolist():
    if info.compress_type != zipfile.ZIP_STORED:
      raise ConfigError(
        f'{path}: {info.filename} is compressed, as PyTorch never does'
      )
  order = f'{root}byteorder'
  if order in archive.namelist() and archive.read(order) != b'little':
    raise ConfigError(f'{path} is of a big-endian machine; save it again')
  with open(path, 'rb') as file:
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  with archive.open(names[0]) as file:
    return _Unpickler(file, path, archive, root, content).load()


class _Storage(NamedTuple):
  """The flat array of which tensors are views."""

  array: np.ndarray


class _StorageType(NamedTuple):
  """Stands for a class of torch, such as torch.FloatStorage."""

  dtype: np.dtype


class _Call(NamedTuple):
  """A function that a pickle may call, and has no way to change."""

  function: Callable

  def __call__(self, *args):
    """Calls it."""
    return self.function(*args)


class _Unpickler(pickle._Unpickler):
  """Knows what a file of tensors is made of, and refuses anything else."""

  dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

  def __init__(self, file, path, archive, root, content):
    super().__init__(file)
    self.path, self.archive = path, archive
    self.root, self.content = root, content

  def find_class(self, module, name):
    """Returns the stand-in for a name, never what it means in Python."""
    found = _ALLOWED.get((module, name))
    if found is None and module == 'torch' and name in _DTYPES:
      found = _StorageType(np.dtype(_DTYPES[name]))
    if found is None:
      raise ConfigError(
        f'{self.path} asks for {module}.{name}; only tensors and dictionaries '
        'are read, so that a file cannot run code'
      )
    return found

  def persistent_load(self, pid):
    """Returns the storage ('storage', type, key, location, elements)."""
    kind, storage, key, _, count = pid
    if kind != 'storage' or not isinstance(storage, _StorageType):
      raise pickle.UnpicklingError(f'unknown reference {pid!r}')
    info = self.archive.getinfo(f'{self.root}data/{key}')
    if info.file_size != count * storage.dtype.itemsize:
      raise ConfigError(
        f'{self.path}: storage {key} has {info.file_size} bytes; {count} of '
        f'{storage.dtype} need {count * storage.dtype.itemsize}'
      )
    # The name and extra field of the local header are not the directory's.
    start = info.header_offset + _LOCAL_HEADER
    lengths = self.content[start - 4 : start]
    start += sum(struct.unpack('<HH', lengths))
    array = np.frombuffer(self.content, storage.dtype, count, start)
    return _Storage(array)


def _tensor(storage, offset, size, stride, *unused):
  """Returns the view of a storage that torch._utils._rebuild_tensor_v2 is."""
  if not isinstance(storage, _Storage):
    raise pickle.UnpicklingError('a tensor without a storage')
  numbers = (offset, *size, *stride)
  if len(size) != len(stride) or any(
    not isinstance(n, int) or n < 0 for n in numbers
  ):
    raise pickle.UnpicklingError(f'no tensor: {size=} {stride=} {offset=}')
  last = offset + sum(
    (n - 1) * step for n, step in zip(size, stride, strict=True)
  )
  if math.prod(size) and last >= storage.array.size:
    raise pickle.UnpicklingError(
      f'a tensor of {tuple(size)} ends behind its storage'
    )
  steps = [n * storage.array.itemsize for n in stride]
  return np.lib.stride_tricks.as_strided(
    storage.array[offset:], size, steps, writeable=False
  )


def _parameter(tensor, *unused):
  """Returns the tensor of torch._utils._rebuild_parameter."""
  return tensor


_ALLOWED = {
  ('collections', 'OrderedDict'): _Call(collections.OrderedDict),
  ('torch._utils', '_rebuild_tensor_v2'): _Call(_tensor),
  ('torch._utils', '_rebuild_parameter'): _Call(_parameter),
}


def _tensors(tree, seen, prefix=''):
  """Iterates over (name, tensor) of nested dictionaries."""
  # A few that each hold the next one twice are billions of names.
  if id(tree) in seen:
    raise pickle.UnpicklingError('a dictionary is in several places')
  seen.add(id(tree))
  for name, value in tree.items():
    if isinstance(value, np.ndarray):
      yield f'{prefix}{name}', value
    elif isinstance(value, Mapping):
      yield from _tensors(value, seen, f'{prefix}{name}.')
