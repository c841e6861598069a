"""The objective of classifiers."""

from collections.abc import Callable

import jax.numpy as jnp

from efficient_attn.config import Config
from efficient_attn.train.objectives.cross_entropy import (
  cross_entropy,
  divergence,
)
from efficient_attn.train.objectives.sums import weighted_sums
from efficient_attn.train.objectives.tokens import hides_padding


def classification(config: Config, token_bytes) -> Callable:
  """Predicts the class of an image or of a sequence of tokens."""
  del token_bytes
  hides = hides_padding(config)

  def read(batch):
    if 'image' in batch:
      return dict(image=batch['image'])
    inputs = dict(tokens=batch['tokens'])
    if hides:
      inputs['segment_ids'] = batch['segment_ids']
    return inputs

  def objective(model, batch, key, teacher=None):
    labels, weights = batch['label'], batch['weight']
    inputs = read(batch)
    logits = model(**inputs, key=key)
    loss, nll = cross_entropy(logits, labels, **vars(config.loss))
    # Images, or tokens.
    size = inputs['tokens'].size if 'tokens' in inputs else weights.size
    extra = dict(tokens_read=jnp.float32(size))
    if teacher is not None:
      share = config.teacher.weight
      kl = divergence(logits, teacher(**inputs), config.teacher.temperature)
      loss = (1 - share) * loss + share * kl
      extra['kl'] = jnp.sum(kl * weights)
    hits = jnp.argmax(logits, axis=-1) == labels
    return weighted_sums(loss, nll, hits, weights) | extra

  return objective
