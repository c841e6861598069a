"""Validation: the mean over every example, whatever the batches."""

import collections
import itertools
from collections.abc import Callable, Iterable

import jax

from efficient_attn.config import ConfigError
from efficient_attn.train.objectives.sums import means


def evaluate(
  eval_step: Callable,
  params,
  batches: Iterable,
  put: Callable,
  *,
  limit: int = 0,
) -> dict[str, float]:
  """Returns the metrics over `batches`, or the first `limit` of them.

  Args:
    eval_step: from `make_eval_step`, compiled.
    params: of the model.
    batches: of host arrays.
    put: lays a batch out on the devices.
    limit: 0 for all.

  Raises:
    ConfigError: no batch has a target.
  """
  totals = collections.Counter()
  running = None
  for batch in itertools.islice(batches, limit or None):
    # Reading the batch before keeps few computations waiting: XLA's CPU client
    # can deadlock on collectives when more than 32 of them queue.
    before, running = running, eval_step(params, put(batch))
    totals.update(jax.device_get(before or {}))
  totals.update(jax.device_get(running or {}))
  if not totals['weight']:
    raise ConfigError(
      'the validation set has no target, so that there is nothing to measure; '
      'change data.valid_path, valid_options, seq_len or packing'
    )
  return {name: float(x) for name, x in means(totals).items()}
