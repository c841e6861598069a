"""Directories of weights as runs, and runs as directories of weights."""

import dataclasses
import functools
import os
import pathlib
import shutil

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficient_attn import config_files, interop, sharding
from efficient_attn.config import ConfigError, InitConfig
from efficient_attn.interop.convert import Weights
from efficient_attn.interop.files import copy_companions, is_weights
from efficient_attn.train import workdir as folder
from efficient_attn.train.check import check
from efficient_attn.train.checkpoint import Checkpoints
from efficient_attn.train.load import load_model
from efficient_attn.train.state import changing, first_state

SOURCE = 'source'  # folder of a run: what came with its weights, but for them


def adopt(
  directory: str | os.PathLike, workdir: str | os.PathLike
) -> pathlib.Path:
  """Makes a run, of no steps yet, of a directory of weights.

  Args:
    directory: of the weights; see `interop.load`.
    workdir: of the run, new. What came with the weights is in its folder
      `source`, from where the run reads its tokenizer.

  Returns:
    The folder of the run.
  """
  weights, path = Weights(directory), folder.resolve(workdir)
  if (path / 'config.json').exists():
    raise ConfigError(
      f'--workdir={str(workdir)!r}: a run is there; use another'
    )
  config = dataclasses.replace(weights.config, init_from=InitConfig())
  checked = check(config)
  config, mesh = checked.config, sharding.make_mesh(config.mesh)
  source = path / SOURCE
  if config.data.tokenizer != 'bytes':
    tokenizer = str(source / 'tokenizer.json')
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    config = dataclasses.replace(config, data=data)
  with folder.clear_disk_faults(path), folder.only_writer(path):
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    shutil.copyfile(weights.directory / 'config.json', source / 'config.json')
    copy_companions(weights.directory, source)
    params = weights.params(mesh, np.dtype(np.float32))
    with jax.set_mesh(mesh):
      replicated = NamedSharding(mesh, P())
      key = jax.device_put(jax.random.key(config.seed), replicated)
      start = functools.partial(first_state, config, checked.optimizer)
      state = jax.jit(start)(params, key)
    checkpoints = Checkpoints(path, config, checked.dataset.fingerprint)
    checkpoints.save(0, changing(state, config), iter(checked.dataset.train))
    checkpoints.close()
    config_files.save(config, path / 'config.json')
  return path


def publish(workdir: str | os.PathLike, directory: str | os.PathLike) -> None:
  """Saves the newest model of a run as a directory of weights."""
  path = folder.resolve(workdir)
  config, model = load_model(path)
  began = folder.resolve(config.init_from.run or path)
  places = (path / SOURCE, began, began / SOURCE)
  source = next(filter(is_weights, places), '')
  interop.save(config, model, directory, source=source)
