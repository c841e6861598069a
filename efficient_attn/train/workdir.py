"""The folder of a run: its path, its one writer, its config, a full disk."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficient_attn import config as configs
from efficient_attn import config_files, data, formats
from efficient_attn.config import Config, ConfigError

# A disk that is full or failing: a file cannot be written, whoever writes it.
DISK_FAULTS = {
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EIO,
  errno.EROFS,
}
# What a file system without locks says.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class DiskError(ConfigError):
  """The disk of a run is full or failing; its checkpoints are as they were."""


def resolve(workdir: str | os.PathLike) -> pathlib.Path:
  """Expands ~; raises for what is no path of a file system."""
  if re.match('[A-Za-z][A-Za-z0-9+.-]+:/', str(workdir)):
    raise ConfigError(
      f'--workdir={str(workdir)!r}: object stores are not supported; give a '
      'folder of a file system, such as a mounted bucket'
    )
  try:
    return pathlib.Path(workdir).expanduser()
  except RuntimeError:  # ~ of nobody
    raise ConfigError(
      f'--workdir={str(workdir)!r}: there is no such user'
    ) from None


@contextlib.contextmanager
def locked(path: pathlib.Path, flag: str):
  """Creates a folder and locks it; a crash frees it, too.

  Yields:
    Whether no other process has the lock. A file system without locks says
    so to everybody.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    file = (path / '.lock').open('a')
  except OSError as e:
    raise ConfigError(
      f'{flag}={str(path)!r}: {e.strerror}; give a folder that can be written'
    ) from None
  with file:
    free = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      free = False
    except OSError as e:
      if e.errno not in _NO_LOCKS:
        raise
    yield free


@contextlib.contextmanager
def only_writer(workdir: pathlib.Path):
  """Creates the folder and keeps other runs out."""
  with contextlib.ExitStack() as stack:
    free = True
    if jax.process_index() == 0:
      free = stack.enter_context(locked(workdir, '--workdir'))
    if not multihost_utils.broadcast_one_to_all(np.asarray(free)):
      raise ConfigError(
        f'--workdir={str(workdir)!r}: another process trains there; wait for '
        'its end, or use another workdir'
      )
    yield


def read_config(workdir: pathlib.Path) -> Config | None:
  """Returns the config that a run was last started with, if there is one."""
  file = workdir / 'config.json'
  if not file.exists():
    return None
  try:
    return configs.resolve(config_files.read_json(file))
  except ConfigError as e:
    raise ConfigError(
      f'{file} cannot be read: {e}. Delete it and run the training command '
      'again, which writes it anew'
    ) from None


def check_same_run(config: Config, workdir: pathlib.Path) -> None:
  """Raises when a run would continue as another than it began.

  With other data, or with options whose defaults have changed since.
  """
  before = read_config(workdir)
  if before is None:
    return
  for name, old, new in differences(before.model, config.model, 'model'):
    if formats.changed(name):
      raise ConfigError(
        f'{name}={new!r} but the run in {workdir} began with {old!r}, when that'
        f' was the default; continue it with --config.{name}={old}, or use a '
        'new workdir'
      )
  # One of an earlier version does not have every option.
  before = dataclasses.replace(before, data=data.complete(before.data))
  for key in ('seed', 'batch_size', 'data'):
    for name, old, new in differences(
      getattr(before, key), getattr(config, key), key
    ):
      raise ConfigError(
        f'{name}={new!r} but the run in {workdir} began with {old!r}; '
        'use a new workdir'
      )


def differences(before, now, key: str):
  """Yields the (key, before, now) in which a part of two configs differs.

  Both are compared as the JSON that config.json would hold: it has lists for
  tuples, strings for the keys of options, and no NaN that equals itself.
  """
  before, now = _as_json(before), _as_json(now)
  if isinstance(before, dict) and isinstance(now, dict):
    for name in sorted(before.keys() | now.keys()):
      yield from differences(before.get(name), now.get(name), f'{key}.{name}')
  elif json.dumps(before) != json.dumps(now):
    yield key, before, now


def _as_json(value):
  if dataclasses.is_dataclass(value):
    value = dataclasses.asdict(value)
  return json.loads(json.dumps(value))


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps that have a complete checkpoint, oldest first."""
  try:
    names = os.listdir(workdir / 'checkpoints')
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def naming(file: os.PathLike):
  """Adds the file to an error of the operating system that names none."""
  try:
    yield
  except OSError as e:
    if e.filename is None and e.errno is not None:
      raise OSError(e.errno, os.strerror(e.errno), str(file)) from e
    raise


@contextlib.contextmanager
def clear_disk_faults(workdir: pathlib.Path):
  """Makes one line of a full or failing disk."""
  try:
    yield
  except OSError as e:
    if e.errno not in DISK_FAULTS:
      raise
    steps = checkpoint_steps(workdir)
    newest = f'is of step {steps[-1]}' if steps else 'does not exist yet'
    raise DiskError(
      f'{e.filename or workdir}: {e.strerror}; the newest checkpoint {newest}. '
      'Mend the disk and run the same command again to continue'
    ) from None
