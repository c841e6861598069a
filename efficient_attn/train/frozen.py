"""The parameters of a run that no step changes: `workdir/frozen`, written once.

So checkpoints of a run that trains adapters hold these alone.
"""

import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from efficient_attn.config import ConfigError
from efficient_attn.train.seal import CHECKSUMS, DamagedError, seal, verify


def save(workdir: pathlib.Path, params: Any) -> None:
  """Writes them, if there are any, in place of earlier ones."""
  if not params:
    return
  path = _folder(workdir)
  if jax.process_index() == 0:
    shutil.rmtree(path, ignore_errors=True)
  multihost_utils.sync_global_devices('frozen')
  ocp.save_checkpointables(path, dict(state=params))
  seal(path)


def load(workdir: pathlib.Path, abstract: Any) -> Any:
  """Returns them as `abstract` says.

  Raises:
    ConfigError: they are damaged or of another model.
  """
  if not abstract:
    return abstract
  path = _folder(workdir)
  try:
    if not (path / CHECKSUMS).exists() or not verify(path):
      raise DamagedError('its writing did not finish')
    return ocp.load_checkpointables(path, dict(state=abstract))['state']
  except (DamagedError, OSError, ValueError, KeyError) as e:
    raise ConfigError(
      f'the frozen parameters {path} cannot be read '
      f'({str(e).partition(chr(10))[0]}); start over in a new workdir'
    ) from e


def _folder(workdir):
  return pathlib.Path(workdir).absolute() / 'frozen'
