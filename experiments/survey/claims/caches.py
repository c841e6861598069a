"""Caches of two bits and caches that forget, with a trained language model."""

import jax.numpy as jnp
import numpy as np

from efficient_attn.decode.eviction import evict
from efficient_attn.ops.softmax.fake_quant import fake_quant
from experiments import page
from experiments.survey.claim import (
  DERIVED,
  Claim,
  Statement,
  equals,
  holds,
  listed,
  statement,
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
  @statement(says, 'AS p. 15-16', rule='at least 5 percent less error')
  def one_has_less_error(v):
    low, high = v[f'{what} by {better}'], v[f'{what} by {worse}']
    text = f'{low:.3f} by {better}, {high:.3f} by {worse}'
    return holds(low < 0.95 * high), text

  return one_has_less_error


@statement(
  'Keys lose less before they are rotated than after',
  'AS p. 16',
  rule='at least 5 percent less error by channel, trained keys',
)
def less_is_lost_before_rotation(v):
  before = v['trained keys, not rotated by channel']
  after = v['trained keys by channel']
  return holds(before < 0.95 * after), f'{before:.3f} before, {after:.3f} after'


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
    less_is_lost_before_rotation,
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


def stays(v, name: str) -> bool:
  """Whether the loss past twice the length is within 30 percent."""
  return v['beyond'][name] < 1.3 * v['within']


@statement(
  'Attention to all tokens fails past the training length',
  'AS p. 22',
  rule='the loss grows by 30 percent or more',
)
def all_tokens_fail(v):
  beyond = v['beyond']['all tokens']
  text = f'{beyond:.2f} nats past twice the length, {v["within"]:.2f} within'
  return holds(not stays(v, 'all tokens')), text


@statement(
  'A cache of the last tokens alone collapses',
  'AS p. 22',
  rule='the loss grows by 30 percent or more; this model is small and has '
  'formed no sinks if it does not',
)
def last_tokens_fail(v):
  name = f'last {BUDGET}'
  return holds(not stays(v, name)), f'{v["beyond"][name]:.2f} nats'


@statement(
  'With the first four tokens kept it does not',
  'AS p. 22',
  rule='the loss grows by less than 30 percent',
)
def first_tokens_save_it(v):
  loss = v['beyond']['streaming_llm']
  return holds(stays(v, 'streaming_llm')), f'{loss:.2f} nats'


@statement(
  'Keeping what received the most attention loses little',
  'AS p. 25',
  rule='H2O grows by less than 30 percent; restated if only policies that ask '
  'the last queries (SnapKV, TOVA) do: sums over all queries keep what is old, '
  'at distances that the model was not trained on',
)
def heavy_hitters_suffice(v):
  names = ('h2o', 'snapkv', 'tova')
  text = listed('{} {:.2f}', names, [v['beyond'][name] for name in names])
  return holds(stays(v, 'h2o'), restated=stays(v, 'snapkv')), text


R28 = Claim(
  title='Caches that keep the first tokens and the last',
  tier='b',
  measure=forgetting,
  seeds=(0,),
  parts=_forgetting_plot,
  statements=(
    all_tokens_fail,
    last_tokens_fail,
    first_tokens_save_it,
    heavy_hitters_suffice,
  ),
)

CACHES = {'R12': R12, 'R28': R28}
