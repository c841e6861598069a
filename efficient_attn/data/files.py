"""Bytes of files: damaged, compressed, and told apart from others.

`.gz` and `.zst` streams have no random access, which shuffling needs. `plain`
therefore decompresses a file once, into the user's cache folder
($XDG_CACHE_HOME or ~/.cache), and all reads go to that copy. Memory stays
bounded, worker processes and later runs share the copy, and the price is disk
space. The name of a copy is a hash of the path, the modification time and the
fingerprint of the original, and it appears only when it is complete.
"""

import gzip
import hashlib
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from efficient_attn.data import optional
from efficient_attn.data.damage import BadDataError, line

SAMPLE = 4096  # bytes of each part of a file that a fingerprint reads


class File(NamedTuple):
  """A file of plain bytes.

  Attributes:
    name: the path that the user gave.
    path: where its bytes are; differs if `name` is compressed.
  """

  name: str
  path: str


def read(file: File, start: int, stop: int) -> bytes:
  """Returns bytes [start, stop) of a file; fewer is an error."""
  try:
    with open(file.path, 'rb') as stream:
      stream.seek(start)
      found = stream.read(stop - start)
  except OSError as error:
    raise unreadable(file.name, error) from error
  if len(found) < stop - start:
    raise BadDataError(
      f'{file.name!r} ends at byte {start + len(found)}, and had {stop} bytes '
      'when it was opened'
    )
  return found


def size(file: File) -> int:
  """Returns the number of bytes of a file, opened to see that it is readable.

  Raises:
    BadDataError: it cannot be read.
  """
  try:
    with open(file.path, 'rb') as stream:
      return stream.seek(0, os.SEEK_END)
  except OSError as error:
    raise unreadable(file.name, error) from error


def unreadable(name: str, error: OSError) -> BadDataError:
  """Returns what is raised about a file that the system does not give."""
  reason = error.strerror or error
  return BadDataError(f'{name!r} cannot be read: {reason}')


def kind(path: str) -> str:
  """Returns '.jsonl.gz' of a.jsonl.gz and '.txt' of a.txt."""
  root, suffix = os.path.splitext(path)
  return (os.path.splitext(root)[1] if suffix in COMPRESSED else '') + suffix


def plain(config_key: str, path: str) -> File:
  """Returns a file that random access can read; see above."""
  suffix = os.path.splitext(path)[1]
  if suffix not in COMPRESSED:
    return File(path, path)
  folder = _cache()
  try:
    stat = os.stat(path)
    if not stat.st_size:
      raise EOFError('it is empty')
    identity = f'{os.path.realpath(path)}\0{stat.st_mtime_ns}\0'
    identity = os.fsencode(identity + fingerprint([path]))
    target = folder / hashlib.sha256(identity).hexdigest()
    if not target.exists():
      folder.mkdir(parents=True, exist_ok=True)
      _decompress(COMPRESSED[suffix](config_key, path), target)
  except (EOFError, OSError, zlib.error) as error:
    raise BadDataError(
      f'{path!r} cannot be decompressed into {str(folder)!r}: {line(error)}'
    ) from error
  return File(path, str(target))


def _cache():
  try:
    home = pathlib.Path.home() / '.cache'
  except RuntimeError:  # there is none
    home = tempfile.gettempdir()
  root = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or home)
  return root / 'efficient_attn' / 'decompressed'


def _decompress(stream, target):
  handle, new = tempfile.mkstemp(dir=target.parent)
  try:
    with stream, open(handle, 'wb') as file:
      shutil.copyfileobj(stream, file, 2**20)
    os.replace(new, target)  # another process may have been first
  except BaseException:
    os.unlink(new)
    raise


def _zstandard(config_key, path):
  pyarrow = optional.require('pyarrow', config_key, path)
  return pyarrow.input_stream(path, compression='zstd')


COMPRESSED = {'.gz': lambda _, path: gzip.open(path), '.zst': _zstandard}


def fingerprint(paths: Sequence[str]) -> str:
  """Returns a hash of the names and sizes of files and some of their bytes.

  Reads the first, middle and last bytes of each. Names count from the folder
  that holds them all, and times not at all, so that a copy is the same.
  """
  found = hashlib.sha256()
  for name, path in sorted(zip(relative(paths), paths, strict=True)):
    try:
      with open(path, 'rb', buffering=0) as stream:
        total = stream.seek(0, os.SEEK_END)
        found.update(os.fsencode(f'{name}\0{total}\0'))
        for start in (0, (total - SAMPLE) // 2, total - SAMPLE):
          stream.seek(max(start, 0))
          found.update(stream.read(SAMPLE))
    except OSError as error:
      raise unreadable(path, error) from error
  return found.hexdigest()


def relative(paths: Sequence[str]) -> list[str]:
  """Returns the paths as seen from the folder that holds them all."""
  folder = os.path.commonpath([os.path.dirname(path) for path in paths])
  return [os.path.relpath(path, folder or '.') for path in paths]
