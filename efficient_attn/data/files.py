"""Bytes of files, damaged or not, and what tells them from others."""

import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from efficient_attn.data.damage import BadDataError

SAMPLE = 4096  # bytes of each part of a file that a fingerprint reads


class File(NamedTuple):
  """A file of plain bytes.

  Attributes:
    name: what errors call it.
    path: where its bytes are.
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
