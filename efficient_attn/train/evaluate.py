"""Validation: the mean over every example, whatever the batches."""

import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from efficient_attn.train.loss import means


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
  """
  totals = None
  for batch in itertools.islice(batches, limit or None):
    sums = eval_step(params, put(batch))
    totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
  if totals is None:
    return {}
  return {name: float(value) for name, value in means(totals).items()}
