"""Fair sizes: parameters, decode state and training FLOPs, and how to match.

The three are counted on the model as it is built, not by formulas.
"""

import dataclasses
import math

import jax

from efficient_attn import models
from efficient_attn.config import Config, ConfigError
from efficient_attn.models import cost
from efficient_attn.train.loss import make_loss
from efficient_attn.train.state import Architecture


def sizes(config: Config, batch: dict) -> dict[str, float]:
  """Counts one model.

  Args:
    config: of a run.
    batch: one of its batches, arrays or their shapes.

  Returns:
    params; state, the bytes of a decode state that has seen as many tokens as
    the batch has (0 for images); flops of the products of a training run,
    three forward passes a step.
  """
  config = dataclasses.replace(config, model=models.with_dtype(config.model))
  architecture = Architecture(config.model)
  params = jax.eval_shape(architecture.draw, jax.random.key(0))
  loss = make_loss(config)
  forward = cost.flops(
    lambda params, batch: loss(architecture.merge(params), batch, None),
    params,
    batch,
  )
  return dict(
    params=sum(leaf.size for leaf in jax.tree.leaves(params)),
    state=_state_bytes(architecture, params, batch),
    flops=3 * forward * config.steps,
  )


def _state_bytes(architecture, params, batch) -> int:
  if 'tokens' not in batch or architecture.config.name != 'lm':
    return 0
  length = batch['tokens'].shape[1]
  return cost.array_bytes(
    jax.eval_shape(
      lambda params: architecture.merge(params).init_cache(1, length), params
    )
  )


def matched(config: Config, batch: dict, quantity: str, target: float):
  """Returns the config with the width that brings `quantity` to `target`.

  Widths are multiples of twice the heads; the nearest, in ratio, wins.

  Raises:
    ConfigError: no width comes within a quarter.
  """
  model = config.model
  if not target:
    raise ConfigError(
      f'sweep.match={quantity!r}: the first architecture has no {quantity}; '
      'match another quantity'
    )
  step = 2 * model.num_heads

  def at(index):
    changed = dataclasses.replace(model, d_model=index * step)
    return dataclasses.replace(config, model=changed)

  def distance(index):
    found = sizes(at(index), batch)[quantity]
    return math.log(found / target) if found else math.inf

  # All three grow with the width: bisect.
  low, high = 1, max(2, 16 * model.d_model // step)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if distance(middle) < 0 else (low, middle)
  best = min(low, high, key=lambda index: abs(distance(index)))
  if abs(distance(best)) > math.log(1.25):
    raise ConfigError(
      f'sweep.match={quantity!r}: {"-".join(model.pattern)} has '
      f'{sizes(at(best), batch)[quantity]:.4g} {quantity} at model.d_model='
      f'{best * step}, the nearest to {target:.4g}; change its other options'
    )
  return at(best)
