"""One training step: gradients of the summed loss, then the optimizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from efficient_attn import sharding
from efficient_attn.config import Config
from efficient_attn.train.objectives.sums import means
from efficient_attn.train.optimizer import eval_params
from efficient_attn.train.state import Architecture, TrainState


def make_train_step(
  config: Config,
  architecture: Architecture,
  optimizer: optax.GradientTransformationExtraArgs,
  loss: Callable,
) -> Callable:
  """Returns step(state, batch) -> (state, metrics), to be jitted.

  With `config.accumulate` = A the batch is taken in A parts, one after the
  other, and the result is the same. A step whose loss or gradient is not finite
  changes nothing but `state.step`, and says so in `metrics['finite']`.
  """

  def summed(params, batch, key):
    model = architecture.merge(params)
    sums = loss(model, batch, key)
    return sums['objective'] + sums['weight'] * model.stack.penalty(), sums

  def gradients(params, batch, key):
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
    grads, sums = gradients(state.params, batch, dropout_key)
    weight = jnp.maximum(sums['weight'], 1)
    grads = jax.tree.map(lambda g: g / weight, grads)

    def mean_objective(params):
      total, sums = summed(params, batch, dropout_key)
      return total / jnp.maximum(sums['weight'], 1)

    updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params, obj_fn=mean_objective
    )
    params = optax.apply_updates(state.params, updates)
    ema = state.ema and optax.incremental_update(
      params, state.ema, 1 - config.ema
    )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums['objective']) & jnp.isfinite(grad_norm)
    params, opt_state, ema = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (params, opt_state, ema),
      (state.params, state.opt_state, state.ema),
    )
    state = TrainState(state.step + 1, params, opt_state, ema, state.key)
    metrics = means(sums) | dict(
      grad_norm=grad_norm,
      tokens_read=sums['tokens_read'],
      weight=sums['weight'],
      finite=finite,
    )
    return state, metrics

  return step


def make_eval_step(architecture: Architecture, loss: Callable) -> Callable:
  """Returns step(params, batch) -> sums of the loss, to be jitted."""

  def step(params, batch):
    return loss(architecture.merge(params), batch, None)

  return step


def evaluated_params(state: TrainState):
  """Returns the parameters to evaluate and to sample from."""
  return state.ema or eval_params(state.opt_state, state.params)


def micro_batches(x: jax.Array, parts: int) -> jax.Array:
  """Splits [B, ...] into [parts, B / parts, ...].

  Part i holds every parts-th row from row i on, so that rows sharded over
  devices stay where they are. Which of the two new axes is sharded must be
  said: JAX takes the first one that the devices divide.
  """
  rows = sharding.activation_spec(('batch',) + (None,) * x.ndim)
  x = x.reshape(-1, parts, *x.shape[1:], out_sharding=sharding.current(rows))
  return jnp.moveaxis(x, 1, 0)
