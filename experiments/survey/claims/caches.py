"""Caches of two bits and caches that forget, with a trained language model."""

import jax.numpy as jnp
import numpy as np

from efficient_attn.decode.eviction import evict
from efficient_attn.ops.softmax.fake_quant import fake_quant
from experiments import page
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  Statement,
  equals,
)
from experiments.survey.trained import (
  activations,
  cached_losses,
  language_model,
  losses,
  texts,
  with_mixer,
)

# By channel: 32 tokens share a scale; by token: the 32 channels of a head do.
GROUPS = {'channel': (1, 32, 1, 1), 'token': (1, 1, 1, 32)}


def cache_bits() -> dict:
  """R12: errors of 2-bit keys and values, drawn with outliers and trained."""
  rng = np.random.default_rng(2)
  normal = rng.standard_normal((1, 1024, 2, 64))
  channels = np.where(rng.random((1, 1, 2, 64)) < 0.1, 10, 1)
  tokens = np.where(rng.random((1, 1024, 2, 1)) < 0.1, 10, 1)
  layers = activations(language_model(), texts(256, 16))
  cases = {
    'keys with outlier channels': [normal * channels],
    'values': [normal],
    'values with outlier tokens': [normal * tokens],
    'trained keys': [layer['key'] for layer in layers],
    'trained keys, not rotated': [layer['raw_key'] for layer in layers],
    'trained values': [layer['value'] for layer in layers],
  }
  found = {}
  for name, arrays in cases.items():
    for by, group in GROUPS.items():
      off = size = 0.0
      for x in arrays:
        x = jnp.asarray(x, jnp.float32)
        off += float(jnp.abs(fake_quant(x, 'uint2', group) - x).sum())
        size += float(jnp.abs(x).sum())
      found[f'{name} by {by}'] = off / size
  found['bits'] = 2 + 2 * 16 / 32  # and a scale and a zero point in 16 bits
  return found


def _by(what, better, worse, says) -> Statement:
  return Statement(
    says=says,
    source='AS p. 15-16',
    measured=lambda v: (
      f'{v[f"{what} by {better}"]:.3f} by {better}, '
      f'{v[f"{what} by {worse}"]:.3f} by {worse}'
    ),
    judge=lambda v: (
      HOLDS
      if v[f'{what} by {better}'] < 0.95 * v[f'{what} by {worse}']
      else FAILS
    ),
    rule='at least 5 percent less error',
  )


R12 = Claim(
  title='Two-bit caches: keys by channel, values by token',
  tier='b',
  measure=cache_bits,
  seeds=(0, 2),
  statements=(
    _by(
      'keys with outlier channels',
      'channel',
      'token',
      'Keys with outlier channels want a scale for each channel',
    ),
    _by(
      'trained keys',
      'channel',
      'token',
      'Keys of a trained model want a scale for each channel',
    ),
    _by('values', 'token', 'channel', 'Values want a scale for each token'),
    _by(
      'values with outlier tokens',
      'token',
      'channel',
      'Values with outlier tokens want a scale for each token',
    ),
    _by(
      'trained values',
      'token',
      'channel',
      'Values of a trained model want a scale for each token',
    ),
    Statement(
      says='Keys lose less before they are rotated than after',
      source='AS p. 16',
      measured=lambda v: (
        f'{v["trained keys, not rotated by channel"]:.3f} before, '
        f'{v["trained keys by channel"]:.3f} after'
      ),
      judge=lambda v: (
        HOLDS
        if v['trained keys, not rotated by channel']
        < 0.95 * v['trained keys by channel']
        else FAILS
      ),
      rule='at least 5 percent less error by channel, trained keys',
    ),
    equals(
      'Two-bit caches are 8 times smaller than 16 bits',
      'AS p. 16',
      '2 bits',
      'bits',
      2,
      unit='bits with scales and zero points of 16 bits a group of 32',
      provenance=DERIVED,
    ),
  ),
)

LENGTH, BUDGET = 1024, 64


def forgetting() -> dict:
  """R28: loss at four times the training length by what the cache keeps."""
  model, tokens = language_model(), texts(LENGTH, 16)
  found = {
    'all tokens': losses(model, tokens),
    f'last {BUDGET}': losses(
      with_mixer(model, 'window', window=BUDGET), tokens
    ),
  }
  for policy in ('streaming_llm', 'h2o', 'snapkv', 'tova'):
    found[policy] = cached_losses(evict(model, policy, BUDGET), tokens)
  edges = range(0, LENGTH, LENGTH // 8)
  return dict(
    starts=list(edges),
    losses={
      name: [float(x[:, a : a + LENGTH // 8].mean()) for a in edges]
      for name, x in found.items()
    },
    beyond={
      name: float(x[:, LENGTH // 2 :].mean()) for name, x in found.items()
    },
    within=float(found['all tokens'][:, : LENGTH // 4].mean()),
  )


def _forgetting_plot(values) -> list:
  starts = values['starts']
  return [
    page.curves(
      {name: (starts, row) for name, row in values['losses'].items()},
      'position',
      'nats per byte',
      f'Trained on 256 tokens; caches of {BUDGET}. Means of 128 positions',
    )
  ]


def _beyond(name, limit):
  return lambda v: v['beyond'][name] < limit * v['within']


R28 = Claim(
  title='Caches that keep the first tokens and the last',
  tier='b',
  measure=forgetting,
  seeds=(0,),
  parts=_forgetting_plot,
  statements=(
    Statement(
      says='Attention to all tokens fails past the training length',
      source='AS p. 22',
      measured=lambda v: (
        f'{v["beyond"]["all tokens"]:.2f} nats past twice the length, '
        f'{v["within"]:.2f} within'
      ),
      judge=lambda v: FAILS if _beyond('all tokens', 1.3)(v) else HOLDS,
      rule='the loss grows by 30 percent or more',
    ),
    Statement(
      says='A cache of the last tokens alone collapses',
      source='AS p. 22',
      measured=lambda v: f'{v["beyond"][f"last {BUDGET}"]:.2f} nats',
      judge=lambda v: FAILS if _beyond(f'last {BUDGET}', 1.3)(v) else HOLDS,
      rule='the loss grows by 30 percent or more; this model is small and has '
      'formed no sinks if it does not',
    ),
    Statement(
      says='With the first four tokens kept it does not',
      source='AS p. 22',
      measured=lambda v: f'{v["beyond"]["streaming_llm"]:.2f} nats',
      judge=lambda v: HOLDS if _beyond('streaming_llm', 1.3)(v) else FAILS,
      rule='the loss grows by less than 30 percent',
    ),
    Statement(
      says='Keeping what received the most attention loses little',
      source='AS p. 25',
      measured=lambda v: ', '.join(
        f'{name} {v["beyond"][name]:.2f}' for name in ('h2o', 'snapkv', 'tova')
      ),
      judge=lambda v: (
        HOLDS
        if _beyond('h2o', 1.3)(v)
        else RESTATED
        if _beyond('snapkv', 1.3)(v)
        else FAILS
      ),
      rule='H2O grows by less than 30 percent; restated if only policies that '
      'ask the last queries (SnapKV, TOVA) do: sums over all queries keep what '
      'is old, at distances that the model was not trained on',
    ),
  ),
)

CACHES = {'R12': R12, 'R28': R28}
