"""Checkpoints of a run: the state and the data iterator, verified on return.

Orbax writes them, asynchronously and atomically, one folder a step. When a
folder is complete its files' checksums are added, so that a truncated or
damaged checkpoint is recognised and the one before it is used.
"""

import concurrent.futures
import json
import logging
import pathlib
import warnings
import zlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from efficient_attn.config import ConfigError

CHECKSUMS = 'checksums.json'
UNFINISHED = 'its writing did not finish'


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`."""

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax is talkative
    self.directory = pathlib.Path(workdir).absolute() / 'checkpoints'
    policies = ocp.training.preservation_policies
    self._orbax = ocp.training.Checkpointer(
      self.directory, preservation_policy=policies.LatestN(keep)
    )
    self._sealing = concurrent.futures.ThreadPoolExecutor(1)
    self._pending = None

  def save(self, step: int, state: Any, iterator: Any) -> None:
    """Saves in the background; the arguments may change once this returns."""
    self.wait()
    for later in self.steps():
      if later >= step:  # a damaged one, which `restore` passed over
        self._orbax.delete(later)
    writing = self._orbax.save_checkpointables_async(
      step, dict(state=state, dataset=iterator)
    )

    def seal():
      writing.result()
      if jax.process_index() == 0:
        _seal(self.directory / str(step))

    self._pending = self._sealing.submit(seal)

  def wait(self) -> None:
    """Returns when the last save is complete; raises if it failed."""
    if self._pending is not None:
      self._pending.result()
      self._pending = None

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first."""
    return sorted(c.step for c in self._orbax.checkpoints)

  def restore(self, abstract_state: Any, iterator: Any) -> Any | None:
    """Returns the newest intact state and winds the iterator to it.

    Args:
      abstract_state: shapes, dtypes and shardings to restore to.
      iterator: set to what follows the last batch of that state, in place; None
        to leave the data alone.

    Returns:
      The state, or None when there is no checkpoint.

    Raises:
      ConfigError: the checkpoint is of another architecture or number of
        processes, or all of them are damaged.
    """
    found = self.steps()
    for step in reversed(found):
      path = self.directory / str(step)
      damage = _damage(path)
      # A kill between the first save and its checksums leaves nothing else.
      if damage is None or (damage == UNFINISHED and len(found) == 1):
        self._check_architecture(step, abstract_state)
        wanted = dict(state=abstract_state)
        if iterator is not None:
          _check_processes(path)
          wanted['dataset'] = iterator
        return self._orbax.load_checkpointables(step, wanted)['state']
      warnings.warn(
        f'checkpoint {path} is damaged ({damage}); trying the one before it',
        stacklevel=2,
      )
    if found:
      raise ConfigError(
        f'{self.directory}: no intact checkpoint among steps {found}; '
        'start over in a new workdir'
      )
    return None

  def _check_architecture(self, step, abstract_state):
    saved = self._orbax.checkpointables_metadata(step).metadata['state']
    saved, ours = _shapes(saved['params']), _shapes(abstract_state.params)
    for name in sorted(saved.keys() | ours.keys()):
      if saved.get(name) != ours.get(name):
        raise ConfigError(
          f'the checkpoint {self.directory / str(step)} is of another model: '
          f'{name} is {saved.get(name, "absent")} there and '
          f'{ours.get(name, "absent")} here; use its config or a new workdir'
        )

  def close(self) -> None:
    """Waits for the last save and releases what Orbax holds."""
    self.wait()
    self._sealing.shutdown()
    self._orbax.close()


def _check_processes(path: pathlib.Path) -> None:
  saved = len(list((path / 'dataset').glob('process_*')))
  if saved != jax.process_count():
    raise ConfigError(
      f'the checkpoint {path} is of {saved} processes, each with its place in '
      f'the data, and there are {jax.process_count()}; continue with {saved}'
    )


def _shapes(params) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): tuple(leaf.shape)
    for path, leaf in leaves
  }


def _checksums(path: pathlib.Path) -> dict[str, int]:
  return {
    str(file.relative_to(path)): zlib.crc32(file.read_bytes())
    for file in sorted(path.rglob('*'))
    if file.is_file() and file.name != CHECKSUMS
  }


def _seal(path: pathlib.Path) -> None:
  """Adds the checksums of a complete checkpoint; the rename makes it atomic."""
  new = path / (CHECKSUMS + '.new')
  sums = _checksums(path)
  new.write_text(json.dumps(sums))
  new.rename(path / CHECKSUMS)


def _damage(path: pathlib.Path) -> str | None:
  """Returns what is wrong with a checkpoint, or None."""
  try:
    sealed = json.loads((path / CHECKSUMS).read_text())
  except FileNotFoundError:
    return UNFINISHED
  except ValueError:
    return f'{CHECKSUMS} is unreadable'
  actual = _checksums(path)
  for name, checksum in sealed.items():
    if name not in actual:
      return f'{name} is missing'
    if actual[name] != checksum:
      return f'{name} has changed'
  return None
