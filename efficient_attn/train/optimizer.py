"""Optimizers and learning-rate schedules, by name, all from optax.

Weight decay is decoupled in every row: a parameter w whose mask is True loses
`learning_rate * weight_decay * w` a step. One call serves all of them:

  updates, opt_state = optimizer.update(grads, opt_state, params, obj_fn=loss)

`obj_fn` maps parameters to the scalar loss of the same batch. Only sophia uses
it, for a Hessian-vector product every `update_interval` steps.
"""

import inspect
from typing import Any

import jax
import optax
from optax import contrib

from efficient_attn.config import ConfigError, OptimizerConfig, choose, nearest

# What follows the warm-up, as a function of the peak, the final fraction, the
# number of steps left and how many of them wsd decays.
SCHEDULES = {
  'constant': lambda peak, final, left, cooldown: optax.constant_schedule(peak),
  'linear': lambda peak, final, left, cooldown: optax.linear_schedule(
    peak, peak * final, left
  ),
  'cosine': lambda peak, final, left, cooldown: optax.cosine_decay_schedule(
    peak, left, alpha=final
  ),
  'wsd': lambda peak, final, left, cooldown: optax.linear_schedule(
    peak, peak * final, cooldown, transition_begin=left - cooldown
  ),
}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns step -> learning rate.

  It rises linearly from 0 at step 0 to its peak at step `warmup_steps`, and
  reaches `final_fraction` of the peak as the last of `steps` steps ends.
  """
  decay = choose('optimizer.schedule', config.schedule, SCHEDULES)
  warmup, peak = config.warmup_steps, config.learning_rate
  cooldown = round(config.cooldown * steps)
  if not 0 <= warmup < steps:
    raise ConfigError(
      f'optimizer.warmup_steps={warmup} must be >= 0 and below steps={steps}'
    )
  if config.schedule == 'wsd' and warmup + cooldown > steps:
    raise ConfigError(
      f'optimizer.cooldown={config.cooldown} must be at most '
      f'{1 - warmup / steps:.3g}: the warm-up takes {warmup} of {steps} steps'
    )
  after = decay(peak, config.final_fraction, steps - warmup, cooldown)
  if not warmup:
    return after
  rise = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def _call(function, options, **arguments):
  """Calls an optax function with our arguments and the user's options."""
  free = inspect.signature(function).parameters.keys() - arguments.keys()
  for name, value in options.items():
    if name not in free:
      raise ConfigError(
        f'optimizer.options.{name}={value!r} is not an option of '
        f'{function.__name__}; {nearest(name, free)}'
      )
  return function(**arguments, **options)


def _decay(lr, decay, mask):
  """Decoupled weight decay, to follow a function that has none."""
  return optax.add_decayed_weights(lambda step: -decay * lr(step), mask)


def _adamw(lr, decay, mask, matrices, options):
  return _call(
    optax.adamw, options, learning_rate=lr, weight_decay=decay, mask=mask
  )


def _lion(lr, decay, mask, matrices, options):
  return _call(
    optax.lion, options, learning_rate=lr, weight_decay=decay, mask=mask
  )


def _adafactor(lr, decay, mask, matrices, options):
  return _call(
    optax.adafactor,
    options,
    learning_rate=lr,
    # optax does not scale this decay by the learning rate.
    weight_decay_rate=lambda step: decay * lr(step),
    weight_decay_mask=mask,
  )


def _muon(lr, decay, mask, matrices, options):
  muon = _call(
    contrib.muon,
    # Updates of the size of adam's, so that both share one learning rate.
    {'consistent_rms': 0.2} | dict(options),
    learning_rate=lr,
    weight_decay=0.0,  # optax would not mask the part trained by adam
    weight_decay_mask=None,
    adam_weight_decay=0.0,
    adam_learning_rate=None,
    muon_weight_dimension_numbers=matrices,
  )
  return optax.chain(_auto_sharded(muon), _decay(lr, decay, mask))


def _sophia(lr, decay, mask, matrices, options):
  return _call(
    contrib.sophia,
    options,
    learning_rate=lr,
    weight_decay=decay,
    weight_decay_mask=mask,
  )


def _schedule_free(lr, decay, mask, matrices, options):
  return _call(
    schedule_free_adamw, options, lr=lr, weight_decay=decay, mask=mask
  )


def _sgd(lr, decay, mask, matrices, options):
  sgd = _call(optax.sgd, options, learning_rate=lr)
  return optax.chain(sgd, _decay(lr, decay, mask))


OPTIMIZERS = {
  'adamw': _adamw,
  'lion': _lion,
  'adafactor': _adafactor,
  'muon': _muon,
  'sophia': _sophia,
  'schedule_free': _schedule_free,
  'sgd': _sgd,
}


def make_optimizer(
  config: OptimizerConfig,
  steps: int,
  weight_decay_mask: Any,
  matrix_axes: Any,
) -> optax.GradientTransformationExtraArgs:
  """Builds the optimizer of a run.

  Args:
    config: names the optimizer, its schedule and its options.
    steps: of the run.
    weight_decay_mask: a tree of bools like the parameters.
    matrix_axes: a tree like the parameters, whose leaves say what muon
      orthogonalises: `optax.contrib.MuonDimensionNumbers(input axes, output
      axes)` for a matrix, whose other axes (stacked layers) are separate
      matrices, or None for a parameter that adam trains (vectors, embeddings,
      the output head).

  Returns:
    The optimizer, to be called as the module's docstring says.
  """
  build = choose('optimizer.name', config.name, OPTIMIZERS)
  optimizer = build(
    make_schedule(config, steps),
    config.weight_decay,
    weight_decay_mask,
    matrix_axes,
    config.options,
  )
  if config.clip_norm > 0:
    clip = optax.clip_by_global_norm(config.clip_norm)
    optimizer = optax.chain(clip, optimizer)
  return optax.with_extra_args_support(optimizer)


def eval_params(opt_state: Any, params: Any) -> Any:
  """Returns the parameters to evaluate: those averaged by schedule_free."""

  def averages(node):
    return isinstance(node, contrib.ScheduleFreeState)

  for node in jax.tree.leaves(opt_state, is_leaf=averages):
    if averages(node):
      return contrib.schedule_free_eval_params(node, params)
  return params


def schedule_free_adamw(
  lr,
  weight_decay,
  mask,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_lr_power=2.0,
  state_dtype=None,
):
  """`contrib.schedule_free_adamw` with a mask and a schedule."""
  adamw = optax.chain(
    optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(lr),
  )
  return contrib.schedule_free(adamw, lr, b1, weight_lr_power, state_dtype)


def _auto_sharded(optimizer):
  """Lets the compiler shard the inside of `update`.

  Muon multiplies a matrix by its transpose: on an explicit mesh the sharding
  of such a product is ambiguous. Updates and state keep their shardings.
  """

  def update(updates, state, params=None):
    kept = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
    auto = jax.sharding.auto_axes(optimizer.update, out_sharding=kept)
    return auto(updates, state, params)

  return optax.GradientTransformation(optimizer.init, update)
