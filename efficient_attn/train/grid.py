"""Runs that differ in numbers only, trained as one program.

The step of `trainer.run` is vmapped over a grid of learning rates, weight
decays and seeds, a scan makes many steps one call, and the runs are spread over
the devices. Small models fill a machine only together: alone each waits for the
machine to start its many little operations.
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from efficient_attn import data
from efficient_attn.config import Config, ConfigError, DataConfig
from efficient_attn.models import jit_init, with_dtype
from efficient_attn.train.check import check_fit
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.objectives.sums import means
from efficient_attn.train.state import Architecture, first_state
from efficient_attn.train.step import (
  evaluated_params,
  make_eval_step,
  make_train_step,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What the runs of a grid differ in."""

  learning_rate: float
  weight_decay: float
  seed: int


class Grid:
  """The runs of one architecture.

  Attributes:
    config: of all runs; its learning rate, weight decay and seed do not count.
    runs: in order.
    steps: how many are done.
    losses: of every training step, [steps, runs], filled as training goes on.
    skipped: steps whose loss or gradient was not finite, [runs].
  """

  def __init__(self, config: Config, runs: Sequence[Run], devices=None):
    for key, other in (
      ('init_from.run', config.init_from.run),
      ('teacher.run', config.teacher.run),
    ):
      if other:
        raise ConfigError(
          f'{key}={other!r} is not for a grid of runs, which begin anew and '
          'alone; use launch/train.py'
        )
    self.runs = list(runs)
    devices = (devices or jax.devices())[: len(self.runs)]
    self._mesh = jax.sharding.Mesh(np.array(devices), ('runs',))
    model = with_dtype(config.model, self._mesh)
    self.config = dataclasses.replace(config, model=model)
    filled = self.runs + self.runs[-1:] * (-len(self.runs) % len(devices))
    self._seeds = sorted({run.seed for run in self.runs})
    self._numbers = dict(
      learning_rate=np.array([r.learning_rate for r in filled], np.float32),
      weight_decay=np.array([r.weight_decay for r in filled], np.float32),
      seed=np.array([r.seed for r in filled], np.uint32),
      row=np.array([self._seeds.index(r.seed) for r in filled], np.int32),
    )
    self._architecture = Architecture(
      self.config.model, self.config.lora, self.config.optimizer
    )
    sets = [self._load(self.config.data, seed) for seed in self._seeds]
    self._batches = [iter(dataset.train) for dataset in sets]
    self._loss = make_objective(self.config, sets[0].tokenizer)
    self._valid = sets[0].valid
    init = self._spread(jax.vmap(self._init), P('runs'))
    self._state = jit_init(init, self._mesh)(self._numbers)
    self._train = jax.jit(
      self._spread(self._train_steps, P('runs'), P('runs'), P()),
      donate_argnums=0,
    )
    self._evaluate = self._evaluator(self._loss)
    self.steps = 0
    self.losses = np.zeros((0, len(self.runs)), np.float32)
    self.skipped = np.zeros(len(self.runs), int)

  def train(self, steps: int) -> None:
    """Makes `steps` steps, in one call of one program."""
    rows = [[next(batches) for batches in self._batches] for _ in range(steps)]
    batches = jax.tree.map(
      lambda *x: np.stack(x).reshape(steps, len(self._seeds), *x[0].shape),
      *[batch for row in rows for batch in row],
    )
    self._state, (losses, finite) = self._train(
      self._state, self._numbers, batches
    )
    count = len(self.runs)
    losses, finite = (np.asarray(x).T[:, :count] for x in (losses, finite))
    self.losses = np.concatenate([self.losses, losses])
    self.skipped += (~finite).sum(0)
    self.steps += steps

  def evaluate(self, config: DataConfig | None = None) -> list[dict]:
    """Returns the validation metrics of each run, on all examples."""
    if config is None:
      valid, evaluate = self._valid, self._evaluate
    else:
      dataset = self._load(config, 0)
      loss = make_objective(
        dataclasses.replace(self.config, data=config), dataset.tokenizer
      )
      valid, evaluate = dataset.valid, self._evaluator(loss)
    params = evaluated_params(self._state)
    totals = collections.Counter()
    for batch in valid:
      totals.update(jax.device_get(evaluate(params, batch)))
    found = jax.vmap(means)(dict(totals))
    return [
      {name: float(x[i]) for name, x in found.items()}
      for i in range(len(self.runs))
    ]

  def model(self, run: int) -> nnx.Module:
    """Returns the model of one run, with the parameters it is judged by."""
    params = jax.tree.map(lambda x: x[run], evaluated_params(self._state))
    params = jax.tree.map(jnp.asarray, jax.device_get(params))
    return self._architecture.merge(params)

  def _load(self, config, seed):
    dataset = data.load(config, batch_size=self.config.batch_size, seed=seed)
    check_fit(dataclasses.replace(self.config, data=config), dataset)
    return dataset

  def _optimizer(self, numbers):
    changed = dataclasses.replace(
      self.config.optimizer,
      learning_rate=numbers['learning_rate'],
      weight_decay=numbers['weight_decay'],
    )
    return self._architecture.optimizer(
      dataclasses.replace(self.config, optimizer=changed)
    )

  def _init(self, numbers):
    key = jax.random.key(numbers['seed'])
    params, frozen = self._architecture.split(
      self._architecture.initial_params(key)
    )
    optimizer = self._optimizer(numbers)
    return first_state(self.config, optimizer, params, key, frozen)

  def _train_steps(self, states, numbers, batches):
    def one(state, numbers, batch):
      optimizer = self._optimizer(numbers)
      step = make_train_step(
        self.config, self._architecture, optimizer, self._loss
      )
      state, metrics = step(state, batch)
      return state, (metrics['loss'], metrics['finite'])

    def body(states, batch):
      batch = jax.tree.map(lambda x: x[numbers['row']], batch)
      return jax.vmap(one)(states, numbers, batch)

    states, metrics = jax.lax.scan(body, states, batches)
    return states, jax.tree.map(jnp.transpose, metrics)  # runs first

  def _evaluator(self, loss):
    step = make_eval_step(self._architecture, loss)

    def evaluate(params, batch):
      return jax.vmap(lambda params: step(params, batch))(params)

    return jax.jit(self._spread(evaluate, P('runs'), P()))

  def _spread(self, f, *in_specs):
    """Gives each device its runs; what is not of runs goes to all."""
    return jax.shard_map(
      f,
      mesh=self._mesh,
      in_specs=in_specs,
      out_specs=P('runs'),
      check_vma=False,
    )
