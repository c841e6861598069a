"""Directories of weights: config.json, safetensors files and their index.

Nothing here runs what a file says. The package safetensors checks a header;
tensors are then mapped, so that reading a part of one costs no more. Files of
PyTorch are read where there are no others, see `torch_file`.
"""

import json
import math
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.interop.dialects import is_known
from efficient_attn.interop.torch_file import TorchTensor, open_torch_file

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
TORCH_INDEX = 'pytorch_model.bin.index.json'
TORCH_SINGLE = 'pytorch_model.bin'
DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SHARD = 5 * 10**9  # bytes a file holds at most, but for a larger tensor

# What travels with the weights.
COMPANIONS = (
  'tokenizer*', 'special_tokens_map.json', 'added_tokens.json', 'vocab.*',
  'merges.txt', '*.tiktoken', 'spiece.model', 'chat_template*',
  'generation_config.json', 'LICENSE*', 'LICENCE*', 'NOTICE*', 'USE_POLICY*',
)  # fmt: skip


class Tensor(NamedTuple):
  """A tensor of a file that is not read yet."""

  path: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  def map(self) -> np.ndarray:
    """Maps it into memory until the array is dropped."""
    if not math.prod(self.shape):
      return np.zeros(self.shape, self.dtype)
    size = math.prod(self.shape) * self.dtype.itemsize
    found = np.memmap(self.path, np.uint8, 'r', self.offset, (size,))
    return np.asarray(found).view(self.dtype).reshape(self.shape)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except OSError as e:
    raise ConfigError(f'{path}: {e.strerror}') from None
  except (ValueError, RecursionError) as e:
    raise ConfigError(f'{path}: not JSON ({e})') from None
  if not isinstance(found, dict):
    raise ConfigError(f'{path}: a JSON object is needed')
  return found


def is_weights(directory: pathlib.Path) -> bool:
  """Tells a directory of weights from the folder of a run."""
  file = directory / 'config.json'
  try:
    return file.is_file() and is_known(json.loads(file.read_text()))
  except (OSError, ValueError, TypeError):
    return False


def open_tensors(directory: pathlib.Path) -> dict[str, Tensor | TorchTensor]:
  """Returns all tensors of a directory by their names."""
  if (directory / INDEX).exists():
    return _indexed(directory, INDEX, _open)
  found = [directory / SINGLE]
  if not found[0].exists():
    found = sorted(directory.glob('*.safetensors'))
  if not found and (directory / TORCH_INDEX).exists():
    return _indexed(directory, TORCH_INDEX, _open_torch)
  if not found and (directory / TORCH_SINGLE).exists():
    return _open_torch(directory / TORCH_SINGLE)
  if len(found) != 1:
    names = ', '.join(file.name for file in found) or 'none'
    raise ConfigError(
      f'{directory}: {SINGLE} or {INDEX} is needed; safetensors files there: '
      f'{names}'
    )
  return _open(found[0])


def _indexed(directory, index, open_file):
  names = read_json(directory / index).get('weight_map')
  if not isinstance(names, dict) or not names:
    raise ConfigError(f'{directory / index}: it has no weight_map')
  files = {}
  for name in sorted({*map(str, names.values())}):
    if pathlib.PurePosixPath(name).name != name or '\\' in name:
      raise ConfigError(
        f'{directory / index}: {name!r} is not a file of this directory'
      )
    files[name] = open_file(directory / name)
  found = {}
  for tensor, name in names.items():
    if tensor not in files[str(name)]:
      raise ConfigError(f'{directory / name}: {tensor}, which {index} says is '
                        'there, is missing')  # fmt: skip
    found[tensor] = files[str(name)].pop(tensor)
  for name, rest in files.items():
    if rest:
      raise ConfigError(
        f'{directory / name}: {min(rest)} is not in {index}; the files do not '
        'belong together'
      )
  return found


def _open_torch(path):
  """Returns the tensors of a file of PyTorch."""
  found = open_torch_file(path)
  for name, tensor in found.items():
    if tensor.dtype not in CODES:
      raise ConfigError(
        f'{path}: {name} has dtype {tensor.dtype}; only '
        f'{", ".join(map(str, CODES))} are read'
      )
  return found


def _open(path):
  """Checks the header of a file and returns what it describes."""
  try:
    import safetensors
  except ImportError:
    raise ConfigError(
      f"{path}: reading it needs safetensors; pip install 'efficient_attn[hf]'"
    ) from None
  try:
    with safetensors.safe_open(path, framework='numpy'):
      pass
    with path.open('rb') as file:
      (size,) = struct.unpack('<Q', file.read(8))
      header = json.loads(file.read(size))
  except safetensors.SafetensorError as e:
    raise ConfigError(f'{path}: not a whole safetensors file ({e})') from None
  except OSError as e:
    raise ConfigError(f'{path}: {e.strerror or e}') from None
  header.pop('__metadata__', None)
  found = {}
  for name, said in header.items():
    if said['dtype'] not in DTYPES:
      raise ConfigError(
        f'{path}: {name} has dtype {said["dtype"]}; only {", ".join(DTYPES)} '
        'are read, so convert quantised weights first'
      )
    dtype, offset = DTYPES[said['dtype']], 8 + size + said['data_offsets'][0]
    found[name] = Tensor(path, dtype, tuple(said['shape']), offset)
  return found


def copy_companions(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies tokenizer, generation config and licence."""
  found = {file for pattern in COMPANIONS for file in source.glob(pattern)}
  for file in sorted(found):
    if file.is_file():
      shutil.copyfile(file, target / file.name)


def write_tensors(
  directory: pathlib.Path,
  tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  value: Callable[[str], np.ndarray],
) -> None:
  """Writes safetensors files, one tensor in memory at a time.

  Args:
    directory: that exists.
    tensors: their shapes and dtypes.
    value: from a name to the array.
  """
  shards, filled = [[]], 0
  for name, (shape, dtype) in tensors.items():
    size = math.prod(shape) * dtype.itemsize
    if filled and filled + size > SHARD:
      shards, filled = [*shards, []], 0
    shards[-1].append(name)
    filled += size
  if len(shards) == 1:
    _write(directory / SINGLE, shards[0], tensors, value)
    return
  index = {}
  for i, names in enumerate(shards):
    file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    _write(directory / file, names, tensors, value)
    index |= dict.fromkeys(names, file)
  total = sum(math.prod(s) * d.itemsize for s, d in tensors.values())
  said = {'metadata': {'total_size': total}, 'weight_map': index}
  (directory / INDEX).write_text(json.dumps(said, indent=2))


def _write(
  path: pathlib.Path, names: Iterable[str], tensors, value: Callable
) -> None:
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for name in names:
    shape, dtype = tensors[name]
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {
      'dtype': CODES[dtype],
      'shape': list(shape),
      'data_offsets': [offset, end],
    }
    offset = end
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for name in names:
      array = np.ascontiguousarray(value(name))
      file.write(array.reshape(-1).view(np.uint8).data)
