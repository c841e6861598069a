"""Opening a trained run: its config and its model."""

import pathlib

import jax
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import Config, ConfigError
from efficient_attn.train import workdir as folder
from efficient_attn.train.checkpoint import Checkpoints
from efficient_attn.train.state import Architecture
from efficient_attn.train.step import evaluated_params


def load_model(workdir: str | pathlib.Path) -> tuple[Config, nnx.Module]:
  """Returns the config and the newest model of a run, on one device.

  The parameters are the averaged ones where the run keeps an average. The run
  may be going on; nothing is written in its folder.
  """
  workdir = folder.resolve(workdir)
  config = folder.read_config(workdir)
  if config is None:
    raise ConfigError(f'--workdir={str(workdir)!r}: no run there (config.json)')
  mesh = sharding.make_mesh('data=1', jax.devices()[:1])
  architecture = Architecture(config.model)
  optimizer = architecture.optimizer(config)
  checkpoints = Checkpoints(workdir, config)
  abstract = architecture.abstract_state(config, optimizer, mesh)
  with jax.set_mesh(mesh):
    state = checkpoints.restore(abstract, iterator=None)
  if state is None:
    raise ConfigError(f'--workdir={str(workdir)!r}: the run has no checkpoint')
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = jax.device_put(evaluated_params(state), one)
  return config, architecture.merge(params)
