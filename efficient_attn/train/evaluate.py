"""Validation: the mean over every example, whatever the batches."""

import collections
import itertools
from collections.abc import Callable

import jax

from efficient_attn.config import ConfigError
from efficient_attn.data import Data
from efficient_attn.train.objectives.sums import means


def evaluate(
  eval_step: Callable,
  params,
  dataset: Data,
  put: Callable,
  *,
  limit: int = 0,
) -> dict[str, float]:
  """Returns the metrics of a validation set, and of each part of a mixture.

  Args:
    eval_step: from `make_eval_step`, compiled.
    params: of the model.
    dataset: with its parts or as a whole.
    put: lays a batch out on the devices.
    limit: batches of each part; 0 for all.

  Returns:
    By name, `loss`; of a part `code/loss`.

  Raises:
    ConfigError: no batch has a target.
  """
  parts, totals = {}, collections.Counter()
  for name, batches in (dataset.valid_parts or {'': dataset.valid}).items():
    some = itertools.islice(batches, limit or None)
    parts[name] = _sums(eval_step, params, some, put)
    totals.update(parts[name])
  found = _means(totals)
  for name in dataset.valid_parts:
    if parts[name]['weight']:
      values = _means(parts[name])
      found |= {f'{name}/{key}': value for key, value in values.items()}
  return found


def _sums(eval_step, params, batches, put) -> collections.Counter:
  totals = collections.Counter()
  running = None
  for batch in batches:
    # Reading the batch before keeps few computations waiting: XLA's CPU client
    # can deadlock on collectives when more than 32 of them queue.
    before, running = running, eval_step(params, put(batch))
    totals.update(jax.device_get(before or {}))
  totals.update(jax.device_get(running or {}))
  return totals


def _means(totals) -> dict[str, float]:
  if not totals['weight']:
    raise ConfigError(
      'the validation set has no target, so that there is nothing to measure; '
      'change data.valid_path, valid_options, seq_len or packing'
    )
  return {name: float(x) for name, x in means(totals).items()}
