"""The objective of classifiers."""

from collections.abc import Callable

import jax.numpy as jnp

from efficient_attn.config import Config
from efficient_attn.train.objectives.cross_entropy import (
  cross_entropy,
  divergence,
)
from efficient_attn.train.objectives.sums import weighted_sums


def classification(config: Config, token_bytes) -> Callable:
  """Predicts the class of an image."""
  del token_bytes

  def objective(model, batch, key, teacher=None):
    labels, weights = batch['label'], batch['weight']
    logits = model(batch['image'], key=key)
    loss, nll = cross_entropy(logits, labels, **vars(config.loss))
    extra = dict(tokens_read=jnp.float32(weights.size))
    if teacher is not None:
      share = config.teacher.weight
      kl = divergence(
        logits, teacher(batch['image']), config.teacher.temperature
      )
      loss = (1 - share) * loss + share * kl
      extra['kl'] = jnp.sum(kl * weights)
    hits = jnp.argmax(logits, axis=-1) == labels
    return weighted_sums(loss, nll, hits, weights) | extra

  return objective
