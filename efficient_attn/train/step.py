"""One training step: gradients of the summed loss, then the optimizer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from efficient_attn import sharding
from efficient_attn.config import Config
from efficient_attn.models import penalty
from efficient_attn.train.balance import rebalanced, without_excess
from efficient_attn.train.objectives.sums import means
from efficient_attn.train.optimizer import eval_params
from efficient_attn.train.state import (
  Architecture,
  Params,
  TrainState,
  joined,
)


def make_train_step(
  config: Config,
  architecture: Architecture,
  optimizer: optax.GradientTransformationExtraArgs,
  objective: Callable,
  teacher: Architecture | None = None,
) -> Callable:
  """Returns step(state, batch) -> (state, metrics), to be jitted.

  With `config.accumulate` = A the batch is taken in A parts, one after the
  other, and the result is the same. A step whose loss or gradient is not finite
  changes nothing but `state.step`, and says so in `metrics['finite']`.

  Args:
    config: of the run.
    architecture: of the model.
    optimizer: of the run.
    objective: see `train.objectives`.
    teacher: the architecture of `state.teacher`, if that is another run; an
      average of the model itself has the model's.
  """

  def make_summed(state):
    if state.teacher is None:
      guide = None
    elif teacher is None:
      guide = architecture.merge(state.teacher, state.frozen)
    else:
      guide = teacher.merge(state.teacher)

    def summed(params, batch, key):
      model = architecture.merge(params, state.frozen)
      sums = objective(model, batch, key, guide)
      total = sums['objective'] + sums['weight'] * penalty(model)
      return total + sums.get('penalty', 0), sums

    return summed

  def gradients(summed, params, batch, key):
    grad = jax.grad(summed, has_aux=True)
    if config.accumulate == 1:
      return grad(params, batch, key)

    def add(total, part):
      return jax.tree.map(jnp.add, total, grad(params, *part)), None

    keys = None if key is None else jax.random.split(key, config.accumulate)
    parts = (
      jax.tree.map(lambda x: micro_batches(x, config.accumulate), batch),
      keys,
    )
    _, sums = jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], parts))
    # Zeros made from the parameters are laid out like them.
    zeros = (
      jax.tree.map(jnp.zeros_like, params),
      jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
    )
    return jax.lax.scan(add, zeros, parts)[0]

  def step(state: TrainState, batch):
    key = jax.random.fold_in(state.key, state.step)
    dropout_key = key if config.model.dropout else None
    summed = make_summed(state)
    grads, sums = gradients(summed, state.params, batch, dropout_key)
    weight = jnp.maximum(sums['weight'], 1)
    grads = jax.tree.map(lambda g: g / weight, grads)
    rates = architecture.balance_rates
    grads, excess = without_excess(grads, rates)

    def mean_objective(params):
      total, sums = summed(params, batch, dropout_key)
      return total / jnp.maximum(sums['weight'], 1)

    updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params, obj_fn=mean_objective
    )
    params = optax.apply_updates(state.params, updates)
    params = rebalanced(params, excess, rates)
    new = dataclasses.replace(
      state, params=params, opt_state=opt_state, **averages(state, params)
    )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums['objective']) & jnp.isfinite(grad_norm)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    metrics = means(sums) | dict(
      grad_norm=grad_norm,
      tokens_read=sums['tokens_read'],
      weight=sums['weight'],
      finite=finite,
    )
    return dataclasses.replace(new, step=state.step + 1), metrics

  def averages(state, params):
    """Returns the next averages of the parameters, by their field."""
    found = {}
    if config.ema:
      found['ema'] = optax.incremental_update(params, state.ema, 1 - config.ema)
    if config.teacher.momentum:
      momentum = rising_momentum(config, state.step)
      found['teacher'] = optax.incremental_update(
        params, state.teacher, 1 - momentum
      )
    return found

  return step


def rising_momentum(config: Config, step: jax.Array) -> jax.Array:
  """Returns the decay of the teacher's average: half a cosine up to 1.

  1 - (1 - momentum) (cos(pi step / steps) + 1) / 2    (2006.07733)
  """
  falling = (jnp.cos(jnp.pi * step / config.steps) + 1) / 2
  return 1 - (1 - config.teacher.momentum) * falling


def make_eval_step(architecture: Architecture, objective: Callable) -> Callable:
  """Returns step(params, batch) -> sums of the objective, to be jitted."""

  def step(params, batch):
    return objective(architecture.merge(params), batch, None)

  return step


def evaluated_params(state: TrainState, frozen: Params | None = None):
  """Returns all parameters of the model to evaluate and to sample from.

  Args:
    state: of the run.
    frozen: its frozen parameters, if the state is without.
  """
  params = state.ema or eval_params(state.opt_state, state.params)
  return joined(params, frozen or state.frozen)


def micro_batches(x: jax.Array, parts: int) -> jax.Array:
  """Splits [B, ...] into [parts, B / parts, ...].

  Part i holds every parts-th row from row i on, so that rows sharded over
  devices stay where they are. Which of the two new axes is sharded must be
  said: JAX takes the first one that the devices divide.
  """
  rows = sharding.activation_spec(('batch',) + (None,) * x.ndim)
  x = x.reshape(-1, parts, *x.shape[1:], out_sharding=sharding.current(rows))
  return jnp.moveaxis(x, 1, 0)
