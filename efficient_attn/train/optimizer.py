"""Optimizers and learning-rate schedules, by name, all from optax.

Weight decay is decoupled in every row: a parameter w whose mask is True loses
`learning_rate * weight_decay * w` a step. One call serves all of them:

  updates, opt_state = optimizer.update(grads, opt_state, params, obj_fn=loss)

`obj_fn` maps parameters to the scalar loss of the same batch. Only sophia uses
it, for a Hessian-vector product every `update_interval` steps.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import optax
from optax import contrib

from efficient_attn.config import (
  ConfigError,
  OptimizerConfig,
  as_dict,
  choose,
)
from efficient_attn.train.groups import (
  OTHERS,
  by_group,
  config_of,
  flat,
  path_of,
)
from efficient_attn.values import (
  BelowOne,
  Dtype,
  NonNegative,
  NonNegativeFloat,
  OneOf,
  Positive,
  PositiveFloat,
  read_arguments,
)

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
  if warmup >= steps:
    raise ConfigError(
      f'optimizer.warmup_steps={warmup} must be below steps={steps}; lower it '
      f'too, as --config.optimizer.warmup_steps={steps // 10}'
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


class Row(NamedTuple):
  """An optax function and what it is called with.

  Attributes:
    function: takes keyword arguments.
    arguments: from the schedule, the weight decay, its mask and the axes of
      the matrices to the arguments that other keys of the config set.
    defaults: of its other arguments, where they are not those of optax.
    wrap: from the optimizer, the schedule, the decay and its mask to the
      optimizer that is used.
  """

  function: Callable[..., optax.GradientTransformation]
  arguments: Callable[..., dict[str, Any]]
  defaults: Mapping[str, Any] = types.MappingProxyType({})
  wrap: Callable = lambda optimizer, lr, decay, mask: optimizer


def _and_decay(optimizer, lr, decay, mask):
  """Adds decoupled weight decay to a function that has none."""
  added = optax.add_decayed_weights(lambda step: -decay * lr(step), mask)
  return optax.chain(optimizer, added)


OPTIMIZERS = {
  'adamw': Row(
    optax.adamw,
    lambda lr, decay, mask, matrices: dict(
      learning_rate=lr, weight_decay=decay, mask=mask
    ),
  ),
  'lion': Row(
    optax.lion,
    lambda lr, decay, mask, matrices: dict(
      learning_rate=lr, weight_decay=decay, mask=mask
    ),
  ),
  'adafactor': Row(
    optax.adafactor,
    lambda lr, decay, mask, matrices: dict(
      learning_rate=lr,
      # optax does not scale this decay by the learning rate.
      weight_decay_rate=lambda step: decay * lr(step),
      weight_decay_mask=mask,
    ),
  ),
  'muon': Row(
    contrib.muon,
    lambda lr, decay, mask, matrices: dict(
      learning_rate=lr,
      weight_decay=0.0,  # optax would not mask the part trained by adam
      weight_decay_mask=None,
      adam_weight_decay=0.0,
      adam_learning_rate=None,
      muon_weight_dimension_numbers=matrices,
    ),
    # Updates of the size of adam's, so that both share one learning rate.
    defaults={'consistent_rms': 0.2},
    wrap=lambda optimizer, *decay: _and_decay(_auto_sharded(optimizer), *decay),
  ),
  'sophia': Row(
    contrib.sophia,
    lambda lr, decay, mask, matrices: dict(
      learning_rate=lr, weight_decay=decay, weight_decay_mask=mask
    ),
  ),
  'schedule_free': Row(
    schedule_free_adamw,
    lambda lr, decay, mask, matrices: dict(
      lr=lr, weight_decay=decay, mask=mask
    ),
  ),
  'sgd': Row(
    optax.sgd,
    lambda lr, decay, mask, matrices: dict(learning_rate=lr),
    wrap=_and_decay,
  ),
}

# What `optimizer.options` may hold, where the function has such an argument.
# optax annotates most of them as arrays.
OPTIONS = {
  'b1': BelowOne,
  'b2': BelowOne,
  'eps': NonNegativeFloat,
  'eps_root': NonNegativeFloat,
  'mu_dtype': Dtype | None,
  'nesterov': bool,
  # adafactor
  'min_dim_size_to_factor': Positive,
  'decay_rate': BelowOne,
  'decay_offset': NonNegative,
  'multiply_by_parameter_scale': bool,
  'clipping_threshold': PositiveFloat | None,
  'momentum': BelowOne | None,
  'dtype_momentum': Dtype,
  'factored': bool,
  # muon
  'ns_coeffs': tuple[float, ...],
  'ns_steps': Positive,
  'beta': BelowOne,
  'adaptive': bool,
  'preconditioning': Annotated[
    str, OneOf(('frobenius', 'spectral', 'aol', 'schatten'))
  ],
  'adam_b1': BelowOne,
  'adam_b2': BelowOne,
  'adam_eps_root': NonNegativeFloat,
  'consistent_rms': PositiveFloat | None,
  # sophia
  'gamma': PositiveFloat,
  'clip_threshold': PositiveFloat | None,
  'update_interval': Positive,
  # schedule_free
  'weight_lr_power': NonNegativeFloat,
  'state_dtype': Dtype | None,
  # sgd
  'accumulator_dtype': Dtype | None,
}


def read_optimizer_options(config: OptimizerConfig) -> dict[str, Any]:
  """Returns all options of the optimizer, those given and the defaults.

  Dtypes are names.
  """
  row = choose('optimizer.name', config.name, OPTIMIZERS)
  ours = row.arguments(None, None, None, None)
  free = {
    name: parameter.default
    for name, parameter in inspect.signature(row.function).parameters.items()
    if name in OPTIONS and name not in ours
  }
  given = read_arguments(
    {name: OPTIONS[name] for name in free},
    as_dict(config.options),
    'optimizer.options.',
    config.name,
  )
  return as_dict(free | dict(row.defaults) | given)


def make_optimizer(
  config: OptimizerConfig,
  steps: int,
  weight_decay_mask: Any,
  matrix_axes: Any,
  groups: Mapping[str, str] = types.MappingProxyType({}),
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
    groups: the group in `config.groups` of each parameter, by path; empty if
      all are trained alike.

  Returns:
    The optimizer, to be called as the module's docstring says.
  """
  if set(groups.values()) <= {OTHERS}:
    optimizer = _one_optimizer(config, steps, weight_decay_mask, matrix_axes)
  elif config.name == 'schedule_free':
    raise ConfigError(
      'optimizer.groups needs one average of all parameters, which '
      "optimizer.name='schedule_free' has not; use another optimizer"
    )
  else:
    trees = flat(weight_decay_mask), _flat_axes(matrix_axes)
    optimizers = {}
    for group in sorted(set(groups.values())):
      own = [
        {name: tree[name] for name in groups if groups[name] == group}
        for tree in trees
      ]
      optimizers[group] = _one_optimizer(config_of(config, group), steps, *own)
    optimizer = by_group(optimizers, groups)
  if config.clip_norm > 0:
    clip = optax.clip_by_global_norm(config.clip_norm)
    optimizer = optax.chain(clip, optimizer)
  return optax.with_extra_args_support(optimizer)


def _one_optimizer(config, steps, mask, matrix_axes):
  options = read_optimizer_options(config)
  row, lr = OPTIMIZERS[config.name], make_schedule(config, steps)
  decay = config.weight_decay, mask
  return row.wrap(
    row.function(**row.arguments(lr, *decay, matrix_axes), **options),
    lr,
    *decay,
  )


def _flat_axes(matrix_axes):
  """Returns the axes by path, None too."""
  leaves = jax.tree_util.tree_leaves_with_path(
    matrix_axes,
    is_leaf=lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers),
  )
  return {path_of(path): leaf for path, leaf in leaves}


def eval_params(opt_state: Any, params: Any) -> Any:
  """Returns the parameters to evaluate: those averaged by schedule_free."""

  def averages(node):
    return isinstance(node, contrib.ScheduleFreeState)

  for node in jax.tree.leaves(opt_state, is_leaf=averages):
    if averages(node):
      return contrib.schedule_free_eval_params(node, params)
  return params
