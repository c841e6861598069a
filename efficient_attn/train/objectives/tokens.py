"""Objectives of models over tokens: what they read and which tokens count."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import sharding
from efficient_attn.config import Config
from efficient_attn.data import tasks
from efficient_attn.layers.mixers import MIXERS
from efficient_attn.layers.stack import row_of
from efficient_attn.train.objectives.chunked import sum_over_tokens
from efficient_attn.train.objectives.experts import routed, routing_sums
from efficient_attn.train.objectives.sums import prediction_sums


def next_token(config: Config, token_bytes: np.ndarray | None) -> Callable:
  """Predicts the next token of packed text."""
  packed = config.data.packing == 'segments'

  def unpack(batch):
    tokens, segment_ids = batch['tokens'], batch['segment_ids']
    inputs = dict(tokens=tokens[:, :-1])
    if packed:
      inputs['positions'] = batch['positions'][:, :-1]
      inputs['segment_ids'] = segment_ids[:, :-1]
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    weights = (same & (segment_ids[:, 1:] > 0)).astype(jnp.float32)
    targets = dict(labels=tokens[:, 1:], weights=weights)
    if 'bytes' in batch:
      targets['bytes'] = batch['bytes'][:, 1:]
    elif token_bytes is not None:
      sizes = jnp.asarray(token_bytes, jnp.float32)
      targets['bytes'] = sharding.lookup(
        sizes, targets['labels'], 'batch', None
      )
    return inputs, targets

  return _of_tokens(config, unpack)


def answers(config: Config, token_bytes) -> Callable:
  """Predicts the answers of a task.

  Where the task bounds the answers of an example, logits are computed at those
  alone: with a large vocabulary they are most of the work.
  """
  del token_bytes
  bounds = [
    tasks.make(config.data, train=train).most_answers for train in (True, False)
  ]
  bound = None if None in bounds else max(bounds)

  def select(hidden, targets):
    if bound is None or bound >= hidden[0].shape[1]:
      return hidden, targets
    # One-hot [B, answer, T], as a gather from a sharded batch has no sharding.
    counts = targets['weights'] > 0
    number = jnp.cumsum(counts, axis=1)[:, None]
    chosen = (number == 1 + jnp.arange(bound)[:, None]) & counts[:, None]

    def at_answers(x):
      return jnp.einsum(
        'bat,btd->bad',
        chosen.astype(x.dtype),
        x,
        precision=jax.lax.Precision.HIGHEST,
      )

    targets = {
      name: jnp.sum(jnp.where(chosen, x[:, None], 0), axis=-1)
      for name, x in targets.items()
    }
    return [at_answers(x) for x in hidden], targets

  return _of_tokens(config, _unpack_task, select=select, by_class=True)


def every_answer(config: Config, token_bytes) -> Callable:
  """Predicts the answers of a task all at once, off one vector."""
  del token_bytes
  return _of_tokens(config, _unpack_task, by_class=True)


def masked_tokens(config: Config, token_bytes) -> Callable:
  """Names the tokens of text that are masked, and some that are not."""
  del token_bytes
  packed, hides = config.data.packing == 'segments', hides_padding(config)

  def unpack(batch):
    inputs, ids = dict(tokens=batch['tokens']), batch['segment_ids']
    if packed:
      inputs |= dict(positions=batch['positions'], segment_ids=ids)
    elif hides:
      inputs['segment_ids'] = jnp.minimum(ids, 1)
    return inputs, dict(labels=batch['labels'], weights=batch['weights'])

  return _of_tokens(config, unpack)


def target_tokens(config: Config, token_bytes) -> Callable:
  """Predicts the next token of a target, of which the source is given."""
  del token_bytes
  hides = hides_padding(config)

  def unpack(batch):
    targets, ids = batch['targets'], batch['target_segment_ids']
    inputs = dict(tokens=targets[:, :-1], source=batch['inputs'])
    if hides:  # that of the targets stands behind them, where none looks
      inputs['source_ids'] = batch['input_segment_ids']
    same = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
    weights = same.astype(jnp.float32)
    return inputs, dict(labels=targets[:, 1:], weights=weights)

  return _of_tokens(config, unpack)


def hides_padding(config: Config) -> bool:
  """Whether all mixers can keep padding apart; the others see its zeros."""
  names = itertools.chain(*config.model.patterns.values())
  return all(MIXERS[row_of(name)].packing for name in names)


def _unpack_task(batch):
  targets = dict(labels=batch['labels'], weights=batch['weights'])
  return dict(tokens=batch['tokens']), targets


def _of_tokens(config, unpack, *, select=None, by_class=False) -> Callable:
  """Builds an objective of a model with `hidden` and `head`.

  Args:
    config: of the run.
    unpack: from a batch to the arguments of `hidden` and to the targets [B, T]:
      labels, weights and perhaps the bytes that each label stands for.
    select: from the hidden vectors [B, T, D] of the model and its teacher and
      the targets to those that count.
    by_class: whether the accuracy of each class is counted.
  """
  loss = functools.partial(
    _token_sums, config=config.loss, teacher=config.teacher, by_class=by_class
  )

  def objective(model, batch, key, teacher=None):
    inputs, targets = unpack(batch)
    (hidden, _), taps = routed(model, model.hidden, **inputs, key=key)
    hidden = [hidden]
    if teacher is not None:
      hidden.append(jax.lax.stop_gradient(teacher.hidden(**inputs)[0]))
    tokens_read = targets['weights'].size  # answered or not
    if select is not None:
      hidden, targets = select(hidden, targets)
    guide = None if teacher is None else (teacher.head, hidden[1])
    sums = sum_over_tokens(loss, model.head, hidden[0], targets, guide)
    sums |= routing_sums(taps, sums['weight'])
    return sums | {'tokens_read': jnp.float32(tokens_read)}

  return objective


def _token_sums(logits, targets, teacher_logits, *, config, teacher, by_class):
  labels, weights = targets['labels'], targets['weights']
  sums = prediction_sums(
    logits, labels, weights, teacher_logits, loss=config, teacher=teacher
  )
  if 'bytes' in targets:
    sums['bytes'] = jnp.sum(targets['bytes'] * weights)
  if by_class:
    hits = jnp.argmax(logits, axis=-1) == labels
    # One-hot, as a scatter has no sharding; XLA sums it without storing it.
    classes = jax.nn.one_hot(labels, logits.shape[-1]) * weights[..., None]
    sums['of_class'] = jnp.sum(classes, (0, 1))
    sums['hits_of_class'] = jnp.sum(classes * hits[..., None], (0, 1))
  return sums
