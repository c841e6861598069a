"""Fair sizes: parameters, decode state and training FLOPs, and how to match.

The three are counted on the model as it is built, not by formulas.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax

from efficient_attn import models
from efficient_attn.config import Config, ConfigError
from efficient_attn.models import cost
from efficient_attn.models.spec import KINDS
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture

CLOSE = 0.02  # matched: what is farther off is looked for further
WORST = 0.25  # and beyond this it is no match


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
  return {quantity: count(config, batch, quantity) for quantity in COUNTS}


def count(config: Config, batch: dict, quantity: str) -> float:
  """Counts one quantity of `sizes`."""
  config = dataclasses.replace(config, model=models.with_dtype(config.model))
  architecture = Architecture(config.model)
  params = jax.eval_shape(architecture.initial_params, jax.random.key(0))
  return COUNTS[quantity](config, architecture, params, batch)


def _params(config, architecture, params, batch) -> int:
  del config, architecture, batch
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _state_bytes(config, architecture, params, batch) -> int:
  if 'tokens' not in batch or not KINDS[config.model.name].generates:
    return 0
  length = batch['tokens'].shape[1]
  return cost.array_bytes(
    jax.eval_shape(
      lambda params: architecture.merge(params).init_cache(1, length), params
    )
  )


def _flops(config, architecture, params, batch) -> float:
  loss = make_objective(config)
  forward = cost.flops(
    lambda params, batch: loss(architecture.merge(params), batch, None),
    params,
    batch,
  )
  return 3 * forward * config.steps


COUNTS = {'params': _params, 'state': _state_bytes, 'flops': _flops}


def matched(config: Config, batch: dict, quantity: str, first: dict) -> Config:
  """Returns the config whose `quantity` is nearest to that of another.

  It is the first within 2 % of these, else the nearest of all: as configured,
  with another ffn width, with another model width, with both. For the state it
  is one of other numbers of heads with other model widths, where a per cent of
  state weighs as much as four of width; the ffn width, on which no state
  depends, then brings the parameters together.

  Args:
    config: of a run.
    batch: one of its batches.
    quantity: params, state or flops.
    first: the sizes to match.

  Raises:
    ConfigError: none comes within a quarter.
  """
  if not first[quantity]:
    raise ConfigError(
      f'sweep.match={quantity!r}: the first architecture has no {quantity}; '
      'match another quantity'
    )

  def counted(config, quantity=quantity):
    return count(config, batch, quantity)

  def off(config, quantity=quantity):
    found = counted(config, quantity)
    return abs(math.log(found / first[quantity])) if found else math.inf

  if quantity == 'state':
    found = min(
      _of_state(config, counted, first['state']),
      key=lambda other: 4 * off(other) + _widening(other, config),
    )
  else:
    found = _nearest(_of_size(config, counted, first[quantity]), off)
  if off(found) > math.log1p(WORST):
    raise ConfigError(
      f'sweep.match={quantity!r}: {"-".join(config.model.pattern)} has '
      f'{counted(found):.4g} {quantity} at model.d_model='
      f'{found.model.d_model}, the nearest to {first[quantity]:.4g}; change '
      'its other options'
    )
  if quantity == 'state':
    params = functools.partial(counted, quantity='params')
    widths = _ffn_widths(found, params, first['params'])
    found = _nearest(
      (found, *widths), functools.partial(off, quantity='params')
    )
  return found


def _nearest(candidates, off) -> Config:
  """Returns the first that is close, else the one that is least off."""
  best, least = None, math.inf
  for candidate in candidates:
    distance = off(candidate)
    if best is None or distance < least:
      best, least = candidate, distance
    if least <= math.log1p(CLOSE):
      break
  return best


def _widening(config: Config, other: Config) -> float:
  return abs(math.log(config.model.d_model / other.model.d_model))


def _changed(config: Config, **changes) -> Config:
  model = dataclasses.replace(config.model, **changes)
  return dataclasses.replace(config, model=model)


def _of_size(config, count, target) -> Iterator[Config]:
  yield config
  yield from _ffn_widths(config, count, target)
  narrow, wide = _widths(config, count, target)
  yield from (narrow, wide)
  yield from _ffn_widths(wide, count, target)
  yield from _ffn_widths(narrow, count, target)


def _of_state(config, count, target) -> Iterator[Config]:
  width = config.model.d_model
  yield config
  yield from _widths(config, count, target)
  for heads in (1, 2, 4, 8, 16):
    if heads != config.model.num_heads:
      wide = -(-width // (2 * heads)) * 2 * heads
      changed = _changed(config, num_heads=heads, d_model=wide)
      yield from _widths(changed, count, target, wide // 2, 2 * wide)


def _widths(config, count, target, low=0, high=0) -> tuple[Config, Config]:
  """Returns the widths around the target, in multiples of twice the heads."""
  step = 2 * config.model.num_heads

  def at(index):
    return _changed(config, d_model=index * step)

  # All three quantities grow with the width: bisect.
  low = max(1, low // step)
  high = max(low + 1, (high or 16 * config.model.d_model) // step)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if count(at(middle)) < target else (low, middle)
  return at(low), at(high)


def _ffn_widths(config, count, target) -> Iterator[Config]:
  """Yields ffn widths that bring the target about, the roundest first."""
  width = config.model.d_model
  ends = [count(_changed(config, ffn_dim=n * width)) for n in (1, 2)]
  slope = (ends[1] - ends[0]) / width  # all are linear in it
  if not slope:
    return
  wanted = width + (target - ends[0]) / slope
  for unit in (64, 8, 1):
    found = unit * round(wanted / unit)
    if found >= width:  # a narrower one is another kind of model
      yield _changed(config, ffn_dim=found)
