"""Sums over a batch, and the means that are reported of them.

Objectives return sums, so that micro-batches, devices and evaluation batches of
unequal weight all add up to exactly the mean over the whole.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from efficient_attn.config import LossConfig, TeacherConfig
from efficient_attn.train.objectives.cross_entropy import (
  cross_entropy,
  divergence,
)
from efficient_attn.train.objectives.experts import routing_means


def prediction_sums(
  logits: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  teacher_logits: jax.Array | None,
  *,
  loss: LossConfig,
  teacher: TeacherConfig,
) -> dict[str, jax.Array]:
  """Sums the losses and hits of predictions by their weights.

  Args:
    logits: [..., classes].
    labels: int [...].
    weights: [...].
    teacher_logits: [..., classes] or None.
    loss: options of the cross-entropy.
    teacher: how much its divergence counts.
  """
  objective, nll = cross_entropy(logits, labels, **vars(loss))
  sums = {}
  if teacher_logits is not None:
    kl = divergence(logits, teacher_logits, teacher.temperature)
    objective = (1 - teacher.weight) * objective + teacher.weight * kl
    sums['kl'] = jnp.sum(kl * weights)
  hits = jnp.argmax(logits, axis=-1) == labels
  return sums | dict(
    objective=jnp.sum(objective * weights),
    loss=jnp.sum(nll * weights),
    correct=jnp.sum(hits * weights),
    weight=jnp.sum(weights),
  )


def means(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Turns the sums of an objective into the metrics of a run."""
  weight = jnp.maximum(sums['weight'], 1)
  found = dict(loss=sums['loss'] / weight, accuracy=sums['correct'] / weight)
  if 'kl' in sums:
    found['kl'] = sums['kl'] / weight
  if 'of_class' in sums:
    # Over the classes that occur, whatever their frequency.
    share = sums['hits_of_class'] / jnp.maximum(sums['of_class'], 1)
    occur = jnp.maximum(jnp.sum(sums['of_class'] > 0), 1)
    found['macro_accuracy'] = jnp.sum(share) / occur
  if 'bytes' in sums:
    nats_per_byte = sums['loss'] / jnp.maximum(sums['bytes'], 1)
    found['bits_per_byte'] = nats_per_byte / math.log(2)
  return found | routing_means(sums)
