"""Opening a trained run, or a directory of weights in the role of one."""

import json
import pathlib
import zlib
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from efficient_attn import interop, sharding
from efficient_attn.config import Config, ConfigError
from efficient_attn.interop.convert import Weights
from efficient_attn.interop.files import is_weights
from efficient_attn.layers.adapter import merge_adapters
from efficient_attn.train import frozen
from efficient_attn.train import workdir as folder
from efficient_attn.train.checkpoint import Checkpoints
from efficient_attn.train.groups import flat
from efficient_attn.train.seal import CHECKSUMS
from efficient_attn.train.state import (
  Architecture,
  Params,
  changing,
  nested,
)
from efficient_attn.train.step import evaluated_params


class Run(NamedTuple):
  """A trained run, whose adapters are merged into its weights.

  Attributes:
    workdir: its folder.
    config: as it was last started.
    trained: the architecture of its model, with adapters and what is frozen.
    architecture: that without adapters.
    said: what named it, for errors.
    weights: the directory in place of a run; None: it is one.
  """

  workdir: pathlib.Path
  config: Config
  trained: Architecture
  architecture: Architecture
  said: str
  weights: Weights | None = None

  def params(self, mesh: jax.sharding.Mesh) -> Params:
    """Returns its newest parameters, laid out on a mesh.

    They are the averaged ones where the run keeps an average. The run may be
    going on; nothing is written in its folder.
    """
    if self.weights is not None:
      return self.weights.params(mesh, np.dtype(np.float32))
    config = self.config
    optimizer = self.trained.optimizer(config)
    abstract = self.trained.abstract_state(config, optimizer, mesh)
    with jax.set_mesh(mesh):
      state = Checkpoints(self.workdir, config).restore(
        changing(abstract, config), iterator=None
      )
      if state is None:
        raise ConfigError(f'{self.said}: the run has no checkpoint')
      fixed = frozen.load(self.workdir, abstract.frozen)
      params = evaluated_params(state, fixed)
      if config.lora.rank:
        params = nested(merge_adapters(flat(params), config.lora))
    return params

  def identity(self) -> str:
    """Returns what changes with its newest checkpoint."""
    if self.weights is not None:
      return self.weights.identity()
    steps = folder.checkpoint_steps(self.workdir)
    if not steps:
      raise ConfigError(f'{self.said}: the run has no checkpoint')
    sums = self.workdir / 'checkpoints' / str(steps[-1]) / CHECKSUMS
    crc = zlib.crc32(sums.read_bytes()) if sums.exists() else 0
    return json.dumps([steps[-1], crc])


def open_run(workdir: str | pathlib.Path, key: str = '--workdir') -> Run:
  """Reads the config of a run, or of a directory of weights.

  Args:
    workdir: of the run, or that directory.
    key: the flag or the key of a config that names it, for errors.
  """
  path, said = folder.resolve(workdir), f'{key}={str(workdir)!r}'
  if is_weights(path):
    weights = Weights(path)
    plain = Architecture(weights.config.model)
    return Run(path, weights.config, plain, plain, said, weights)
  config = folder.read_config(path)
  if config is None:
    raise ConfigError(f'{said}: no run there (config.json)')
  trained = Architecture(config.model, config.lora, config.optimizer)
  plain = Architecture(config.model) if config.lora.rank else trained
  return Run(path, config, trained, plain, said)


def load_model(workdir: str | pathlib.Path) -> tuple[Config, nnx.Module]:
  """Returns the config and the newest model of a run, on one device.

  A directory of weights may stand in its place.
  """
  run = open_run(workdir)
  if run.weights is not None:
    return interop.load(run.workdir)
  params = run.params(sharding.make_mesh('data=1', jax.devices()[:1]))
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return run.config, run.architecture.merge(jax.device_put(params, one))
