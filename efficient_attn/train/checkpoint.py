"""Checkpoints of a run: the state and the data iterator, verified on return.

Orbax writes them, asynchronously, one folder a step, whose final name says that
it is complete. It is then sealed: each process adds the checksums of the files
that it wrote, so that a truncated or damaged checkpoint is recognised and the
one before it is used. One that was not sealed before a kill counts if it loads.
"""

import concurrent.futures
import contextlib
import logging
import os
import pathlib
import re
import shutil
import sys
from dataclasses import fields
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from efficient_attn.config import Config, ConfigError
from efficient_attn.formats import without_parts
from efficient_attn.train import workdir as folder
from efficient_attn.train.groups import flat
from efficient_attn.train.seal import DamagedError, seal, verify
from efficient_attn.train.state import TrainState

UNFINISHED = '.orbax-checkpoint-tmp'  # what Orbax appends until it commits
DELETED = '.deleted'  # what is appended before files are removed one by one


# The parts of a state, the key that decides on each, and what another means.
_PARTS = {
  'params': ('model', 'another model'),
  'opt_state': ('optimizer', 'another optimizer'),
  'ema': ('ema', 'another average'),
  'teacher': ('teacher', 'another teacher'),
}


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`.

  Args:
    workdir: of the run.
    config: of the run, with how many checkpoints it keeps.
    fingerprint: of the data, which a continued run must have too; '' is not
      compared.
    teacher: the same of a teacher.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: Config,
    fingerprint: str = '',
    teacher: str = '',
  ):
    _quieten()
    self._workdir = pathlib.Path(workdir).absolute()
    self.directory = self._workdir / 'checkpoints'
    self._config = config
    self._identity = dict(fingerprint=fingerprint, teacher=teacher)
    self._background = concurrent.futures.ThreadPoolExecutor(1)
    self._pending = None

  def save(self, step: int, state: Any, iterator: Any) -> None:
    """Saves in the background; the arguments may change once this returns."""
    self.wait()
    path = self._path(step)
    if jax.process_index() == 0:
      for later in self.steps():
        if later >= step:  # a damaged one, which `restore` passed over
          _remove(self._path(later))
    with _clear_writing(path):
      writing = ocp.save_checkpointables_async(
        path,
        dict(state=_as_saved(state), dataset=iterator),
        custom_metadata=self._identity,
      )

    def finish():
      with _clear_writing(path):
        writing.result()
      seal(path)
      if jax.process_index() == 0:
        for old in self.steps()[: -self._config.keep_checkpoints]:
          _remove(self._path(old))

    self._pending = self._background.submit(finish)

  def wait(self) -> None:
    """Returns when the last save is complete; raises if it failed."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def steps(self) -> list[int]:
    """Returns the steps that have a complete checkpoint, oldest first."""
    return folder.checkpoint_steps(self._workdir)

  def restore(self, abstract_state: Any, iterator: Any) -> Any | None:
    """Returns the newest intact state and winds the iterator to it.

    Args:
      abstract_state: shapes, dtypes and shardings to restore to.
      iterator: set to what follows the last batch of that state, in place; None
        to read the state alone, and write nothing: also of a run that goes on.

    Returns:
      The state, or None when there is no checkpoint.

    Raises:
      ConfigError: the checkpoint is of another model, optimizer, number of
        processes or data, or all of them are damaged.
    """
    if iterator is not None and jax.process_index() == 0:
      self._clean()
    damaged = []
    # A run that goes on replaces its checkpoints: each turn looks anew.
    while (step := self._newest_but(damaged)) is not None:
      path = self._path(step)
      try:
        return self._load(path, abstract_state, iterator)
      except DamagedError as e:
        damaged.append(step)
        if path.exists():
          print(
            f'warning: checkpoint {path} is damaged ({e}); trying the one '
            'before it',
            file=sys.stderr,
          )
      except Exception:
        damaged.append(step)
        if path.exists():  # not one that was replaced while it was read
          raise
    if damaged:
      raise ConfigError(
        f'{self.directory}: no intact checkpoint among steps '
        f'{sorted(damaged)}; start over in a new workdir'
      )
    return None

  def _newest_but(self, damaged):
    """Returns the newest other step; all processes agree on it."""
    left = set(self.steps()) - set(damaged)
    step = np.asarray(max(left, default=-1))
    step = int(multihost_utils.broadcast_one_to_all(step))
    return None if step < 0 else step

  def _load(self, path, abstract_state, iterator):
    sealed = verify(path)
    try:
      saved = ocp.checkpointables_metadata(path)
      if saved.metadata['state'] is None:
        raise ValueError('there is no metadata of the state')
      metadata = saved.metadata['state']
      named = _named_as(metadata, abstract_state)
      self._check_same_state(path, metadata, named)
      wanted = dict(state=_as_saved(named))
      if iterator is not None:
        _check_processes(path)
        self._check_same_data(path, saved.custom_metadata or {})
        wanted['dataset'] = iterator
      state = TrainState(**ocp.load_checkpointables(path, wanted)['state'])
      state = _renamed(state, abstract_state)
      jax.block_until_ready(state)
    except ConfigError:
      raise
    except (OSError, ValueError, KeyError) as e:
      if sealed:
        raise
      first = str(e).partition('\n')[0]
      raise DamagedError(f'its writing did not finish: {first}') from e
    if iterator is not None and not sealed:
      self._pending = self._background.submit(seal, path)
    return state

  def _check_same_state(self, path, saved, abstract_state):
    for part, (key, cause) in _PARTS.items():
      there = _shapes(saved.get(part))
      ours = _shapes(getattr(abstract_state, part))
      other = [n for n in there.keys() | ours if there.get(n) != ours.get(n)]
      if not other:
        continue
      name = min(other)
      before = folder.read_config(self._workdir) or self._config
      changes = ''.join(
        f', {name}={new!r} and not {old!r}'
        for name, old, new in folder.differences(
          getattr(before, key), getattr(self._config, key), key
        )
      )
      raise ConfigError(
        f'the checkpoint {path} is of {cause}: {part}.{name} is '
        f'{there.get(name, "absent")} there and {ours.get(name, "absent")} '
        f'here{changes}; use its config or a new workdir'
      )

  def _check_same_data(self, path, saved):
    for key, what in ('fingerprint', 'data'), ('teacher', 'teacher'):
      before, now = saved.get(key, ''), self._identity[key]
      if before and now and before != now:
        raise ConfigError(
          f'the {what} has changed since {path} was written (fingerprint {now},'
          f' then {before}); bring it back, or use a new workdir'
        )

  def _clean(self):
    """Removes what a kill left half-written or half-deleted."""
    for suffix in (UNFINISHED, DELETED):
      for path in self.directory.glob(f'*{suffix}'):
        shutil.rmtree(path, ignore_errors=True)

  def _path(self, step):
    return self.directory / str(step)

  def close(self) -> None:
    """Waits for the last save."""
    try:
      self.wait()
    finally:
      self._background.shutdown()


def _quieten() -> None:
  """Keeps Orbax from printing the errors that it also raises.

  It raises the first and closes its event loop, which TensorStore's threads
  then miss, each with a traceback of its own.
  """
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  before = sys.unraisablehook
  if getattr(before, '__name__', '') == 'without_closed_loops':
    return

  def without_closed_loops(error):
    if str(error.exc_value) != 'Event loop is closed':
      before(error)

  sys.unraisablehook = without_closed_loops


@contextlib.contextmanager
def _clear_writing(path):
  """Removes what could not be written, and says so as the system does.

  TensorStore's errors are ValueErrors whose text has the system's number.
  """
  try:
    yield
  except (OSError, ValueError) as e:
    number = getattr(e, 'errno', None)
    if found := re.search(r"os_error_code='(\d+)'", str(e)):
      number = int(found[1])
    if number not in folder.DISK_FAULTS:
      raise
    if jax.process_index() == 0:
      unfinished = path.with_name(path.name + UNFINISHED)
      shutil.rmtree(unfinished, ignore_errors=True)
    raise OSError(number, os.strerror(number), str(path)) from e


def _remove(path: pathlib.Path) -> None:
  """Deletes a checkpoint; its name goes first, so that none is half there."""
  gone = path.with_name(path.name + DELETED)
  path.rename(gone)
  shutil.rmtree(gone, ignore_errors=True)  # what is left goes at the next start


def _check_processes(path: pathlib.Path) -> None:
  saved = len(list((path / 'dataset').glob('process_*')))
  if not saved:
    raise FileNotFoundError('there is no place in the data')
  if saved != jax.process_count():
    raise ConfigError(
      f'the checkpoint {path} is of {saved} processes, each with its place in '
      f'the data, and there are {jax.process_count()}; continue with {saved}'
    )


def _as_saved(state: TrainState) -> dict[str, Any]:
  """Returns what is written of a state: no frozen parameters."""
  parts = {field.name: getattr(state, field.name) for field in fields(state)}
  del parts['frozen']
  if state.teacher is None:
    del parts['teacher']
  return parts


def _named_as(saved, state):
  """Returns a state with the names of a saved one, if it has earlier ones."""
  earlier = _without_parts(state)
  before = earlier.params, state.params, saved['params']
  before, now, there = (_shapes(params).keys() for params in before)
  return earlier if there == before != now else state


def _without_parts(state):
  return jax.tree.map(
    lambda node: without_parts(node) if isinstance(node, dict) else node,
    state,
    is_leaf=lambda node: isinstance(node, dict),
  )


def _renamed(state, wanted):
  """Returns a state of earlier names with those of `wanted`."""
  order = iter(range(len(jax.tree.leaves(wanted))))
  indices = _without_parts(jax.tree.map(lambda _: next(order), wanted))
  if jax.tree.structure(indices) != jax.tree.structure(state):
    return state  # it has today's
  leaves = dict(
    zip(jax.tree.leaves(indices), jax.tree.leaves(state), strict=True)
  )
  found = [leaves[i] for i in range(len(leaves))]
  return jax.tree.unflatten(jax.tree.structure(wanted), found)


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in flat(tree).items()}
