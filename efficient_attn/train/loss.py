"""What each model is trained on, as sums over a batch.

A loss returns sums, not means, so that micro-batches, devices and evaluation
batches of unequal weight all add up to exactly the mean over the whole.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import sharding
from efficient_attn.config import Config, ConfigError, choose
from efficient_attn.data import DATASETS, Tokenizer, tasks


def cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Returns the training objective and the plain cross-entropy, in nats.

    nll = log Z - logits[label],    log Z = logsumexp(logits)
    objective = (1 - e) nll + e mean_c (log Z - logits[c]) + z (log Z)^2

  Args:
    logits: [..., classes].
    labels: int [...].
    label_smoothing: e above.
    z_loss: z above (Chowdhery et al. 2204.02311).

  Returns:
    Two float32 arrays [...].
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  log_z = jax.nn.logsumexp(logits, axis=-1)
  if 1 in labels.shape:  # an axis of one has no sharding that a gather takes
    chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
    picked = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
  else:
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  nll = log_z - picked
  objective = nll
  if label_smoothing:
    uniform = log_z - jnp.mean(logits, axis=-1)
    objective = (1 - label_smoothing) * nll + label_smoothing * uniform
  if z_loss:
    objective = objective + z_loss * log_z**2
  return objective, nll


def next_token(config: Config, token_bytes: np.ndarray | None) -> Callable:
  """The loss of a language model on batches of packed tokens."""
  packed = config.data.packing == 'segments'

  def loss(model, batch, key):
    tokens, segment_ids = batch['tokens'], batch['segment_ids']
    logits, _ = model(
      tokens[:, :-1],
      positions=batch['positions'][:, :-1] if packed else None,
      segment_ids=segment_ids[:, :-1] if packed else None,
      key=key,
    )
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    weights = (same & (segment_ids[:, 1:] > 0)).astype(jnp.float32)
    labels = tokens[:, 1:]
    objective, nll = cross_entropy(logits, labels, **vars(config.loss))
    sums = _sums(objective, nll, logits, labels, weights)
    if 'bytes' in batch:
      sums['bytes'] = jnp.sum(batch['bytes'][:, 1:] * weights)
    elif token_bytes is not None:
      sizes = jnp.asarray(token_bytes, jnp.float32)
      sizes = sharding.lookup(sizes, labels, 'batch', None)
      sums['bytes'] = jnp.sum(sizes * weights)
    return sums

  return loss


def answers(config: Config, token_bytes) -> Callable:
  """The loss of a language model on a task: it counts where answers do.

  Where the task bounds the answers of an example, logits are computed at those
  alone: with a large vocabulary they are most of the work.
  """
  del token_bytes
  bounds = [
    tasks.make(config.data, train=train).most_answers for train in (True, False)
  ]
  bound = None if None in bounds else max(bounds)

  def loss(model, batch, key):
    tokens, labels, weights = (
      batch[name] for name in ('tokens', 'labels', 'weights')
    )
    if bound is None or bound >= tokens.shape[1]:
      logits, _ = model(tokens, key=key)
      return _answered(config, logits, labels, weights, weights.size)
    hidden, _ = model.hidden(tokens, key=key)
    # One-hot [B, answer, T], as a gather from a sharded batch has no sharding.
    number = jnp.cumsum(weights > 0, axis=1)[:, None]
    chosen = (number == 1 + jnp.arange(bound)[:, None]) & (weights > 0)[:, None]
    hidden = jnp.einsum(
      'bat,btd->bad',
      chosen.astype(hidden.dtype),
      hidden,
      precision=jax.lax.Precision.HIGHEST,
    )
    labels, weights = (
      jnp.sum(jnp.where(chosen, x[:, None], 0), axis=-1)
      for x in (labels, weights)
    )
    logits = model.logits(hidden)
    return _answered(config, logits, labels, weights, tokens.size)

  return loss


def every_answer(config: Config, token_bytes) -> Callable:
  """The loss of an auto-encoder on a task, whose logits come all at once."""
  del token_bytes

  def loss(model, batch, key):
    logits, _ = model(batch['tokens'], key=key)
    weights = batch['weights']
    return _answered(config, logits, batch['labels'], weights, weights.size)

  return loss


def _answered(config, logits, labels, weights, read):
  objective, nll = cross_entropy(logits, labels, **vars(config.loss))
  sums = _sums(objective, nll, logits, labels, weights)
  # One-hot, as a scatter over a sharded batch has no sharding; XLA sums it
  # without storing it.
  classes = jax.nn.one_hot(labels, logits.shape[-1]) * weights[..., None]
  hits = jnp.argmax(logits, axis=-1) == labels
  each = {'of_class': classes, 'hits_of_class': classes * hits[..., None]}
  each = {k: jnp.sum(v, (0, 1)) for k, v in each.items()}
  return sums | each | {'tokens_read': jnp.float32(read)}


def classification(config: Config, token_bytes) -> Callable:
  """The loss of an image classifier."""
  del token_bytes

  def loss(model, batch, key):
    logits = model(batch['image'], key=key)
    objective, nll = cross_entropy(logits, batch['label'], **vars(config.loss))
    return _sums(objective, nll, logits, batch['label'], batch['weight'])

  return loss


def _sums(objective, nll, logits, labels, weights):
  hits = jnp.argmax(logits, axis=-1) == labels
  return dict(
    objective=jnp.sum(objective * weights),
    loss=jnp.sum(nll * weights),
    correct=jnp.sum(hits * weights),
    weight=jnp.sum(weights),
    tokens_read=jnp.float32(weights.size),  # tokens or images, answered or not
  )


# (model.name, kind of data) -> loss(model, batch, key) -> sums.
LOSSES = {
  ('lm', 'text'): next_token,
  ('lm', 'task'): answers,
  ('vit', 'images'): classification,
  ('auto_encoder', 'task'): every_answer,
}


def make_loss(config: Config, tokenizer: Tokenizer | None = None) -> Callable:
  """Returns loss(model, batch, key) -> sums, for the model and its data.

  Raises:
    ConfigError: a model of this kind does not read such data.
  """
  model, name = config.model.name, config.data.name
  kind = choose('data.name', name, DATASETS).kind
  if (model, kind) not in LOSSES:
    able = [m for m, k in LOSSES if k == kind]
    raise ConfigError(
      f'model.name={model!r} does not read data.name={name!r} ({kind}); use '
      f'model.name={" or ".join(map(repr, able))}, or other data'
    )
  return LOSSES[model, kind](config, tokenizer and tokenizer.token_bytes)


def means(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Turns the sums of a loss into what is reported."""
  weight = jnp.maximum(sums['weight'], 1)
  found = dict(loss=sums['loss'] / weight, accuracy=sums['correct'] / weight)
  if 'of_class' in sums:
    # Over the classes that occur, whatever their frequency.
    share = sums['hits_of_class'] / jnp.maximum(sums['of_class'], 1)
    occur = jnp.maximum(jnp.sum(sums['of_class'] > 0), 1)
    found['macro_accuracy'] = jnp.sum(share) / occur
  if 'bytes' in sums:
    nats_per_byte = sums['loss'] / jnp.maximum(sums['bytes'], 1)
    found['bits_per_byte'] = nats_per_byte / math.log(2)
  return found
