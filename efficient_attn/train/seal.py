"""Seals of folders: checksums that tell damaged files from whole ones."""

import concurrent.futures
import json
import os
import pathlib
import re
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficient_attn.train import workdir as folder

CHECKSUMS = 'checksums.json'  # of process i > 0: checksums.i.json


class DamagedError(Exception):
  """A checkpoint is not what was written."""


def _files(path: pathlib.Path) -> list[str]:
  """Returns the files of a checkpoint that have a checksum once sealed."""
  return sorted(
    str(file.relative_to(path))
    for file in path.rglob('*')
    if file.is_file() and not file.name.startswith('checksums.')
  )


def _checksums(path: pathlib.Path, names: list[str]) -> dict[str, int]:
  """Reads several files at once: of large ones, it is most of the time."""
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
    sums = pool.map(lambda name: _crc32(path / name), names)
    return dict(zip(names, sums, strict=True))


def _crc32(file: pathlib.Path) -> int:
  checksum = 0
  with file.open('rb') as content:
    while block := content.read(2**22):
      checksum = zlib.crc32(block, checksum)
  return checksum


def seal(path: pathlib.Path) -> None:
  """Adds the checksums of what this process wrote in a complete checkpoint.

  Of the array data, that is its own folder. The first process takes the rest,
  which is small, and the folders that no process of this run has.
  """
  index, count = jax.process_index(), jax.process_count()

  def owner(name):
    found = re.match(r'state/ocdbt\.process_(\d+)/', name)
    number = int(found[1]) if found else 0
    return number if number < count else 0

  own = [name for name in _files(path) if owner(name) == index]
  file = path / (f'checksums.{index}.json' if index else CHECKSUMS)
  with folder.naming(file):
    new = file.with_name(file.name + '.new')
    new.write_text(json.dumps(_checksums(path, own)))
    new.rename(file)


def verify(path: pathlib.Path) -> bool:
  """Verifies the sealed files of a checkpoint; whether those are all.

  Each process reads its share of them.

  Raises:
    DamagedError: one is missing or has changed.
  """
  sums, problem = {}, ''
  try:
    for file in path.glob('checksums*.json'):
      found = json.loads(file.read_bytes())
      if not isinstance(found, dict):
        raise ValueError(f'a {type(found).__name__}')
      sums |= found
    names = _files(path)
    own = sorted(sums)[jax.process_index() :: jax.process_count()]
    missing = sorted(set(own) - set(names))
    if missing:
      problem = f'{missing[0]} is missing'
    else:
      actual = _checksums(path, own)
      changed = [name for name in own if actual[name] != sums[name]]
      problem = f'{changed[0]} has changed' if changed else ''
  except ValueError:
    problem = f'{file.name} is unreadable'
  except OSError as e:
    problem = str(e)
  sound = multihost_utils.process_allgather(np.asarray(not problem))
  if not np.all(sound):
    raise DamagedError(problem or 'as another process says')
  return sums.keys() >= set(names)
