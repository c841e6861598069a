"""A finished tiny run, and its programs for other runs of the same module."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest

from efficient_attn import config as configs
from efficient_attn.train import trainer
from efficient_attn.train.state import Architecture
from tests.train.tiny_runs import run


@pytest.fixture(scope='module')
def shared_programs():
  """Traces each program once: most runs here differ in when they stop."""
  made = {}

  def once(make):
    def shared(*args):
      configured = [a for a in args if dataclasses.is_dataclass(a)]
      configured += [a.config for a in args if isinstance(a, Architecture)]
      key = make.__name__, *map(str, map(without_times, configured))
      if key not in made:
        made[key] = make(*args)
      return made[key]

    return shared

  def without_times(config):
    if isinstance(config, configs.ModelConfig):
      return config
    return dataclasses.replace(
      config, log_every=1, eval_every=0, checkpoint_every=0
    )

  def init(self, *args):
    key = 'init', str(self.config), str(args[0].optimizer), args[0].ema
    if key not in made:
      made[key] = real_init(self, *args)
    return jax.tree.map(jnp.copy, made[key])  # the first step donates it

  real_init = Architecture.init
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, 'make_train_step', once(trainer.make_train_step))
    patch.setattr(trainer, 'make_eval_step', once(trainer.make_eval_step))
    patch.setattr(Architecture, 'init', init)
    patch.setattr(trainer, 'plot_loss', lambda workdir: None)
    yield


@pytest.fixture(scope='module')
def whole(shared_programs, tmp_path_factory):
  """A run that nobody interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  run(workdir)
  return workdir


@pytest.fixture
def copy(whole, tmp_path):
  """Its copy, whose last two steps are to be done again."""
  workdir = tmp_path / 'copy'
  shutil.copytree(whole, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '6')
  return workdir
