"""The objective of classifiers."""

from collections.abc import Callable

import jax.numpy as jnp

from efficient_attn.config import Config
from efficient_attn.train.objectives.experts import routed, routing_sums
from efficient_attn.train.objectives.sums import prediction_sums
from efficient_attn.train.objectives.tokens import hides_padding


def classification(config: Config, token_bytes) -> Callable:
  """Predicts the class of an image or of a sequence of tokens."""
  del token_bytes
  hides = hides_padding(config)

  def unpack(batch):
    if 'image' in batch:
      return dict(image=batch['image'])
    inputs = dict(tokens=batch['tokens'])
    if hides:
      inputs['segment_ids'] = batch['segment_ids']
    return inputs

  def objective(model, batch, key, teacher=None):
    labels, weights = batch['label'], batch['weight']
    inputs = unpack(batch)
    logits, taps = routed(model, model, **inputs, key=key)
    sums = prediction_sums(
      logits,
      labels,
      weights,
      None if teacher is None else teacher(**inputs),
      loss=config.loss,
      teacher=config.teacher,
    )
    # Images, or tokens.
    size = inputs['tokens'].size if 'tokens' in inputs else weights.size
    sums |= routing_sums(taps, sums['weight'])
    return sums | {'tokens_read': jnp.float32(size)}

  return objective
