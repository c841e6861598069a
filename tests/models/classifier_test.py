"""The classifier of sequences: pooling, padding, training, a trained start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_attn import config as configs
from efficient_attn import models
from efficient_attn.config import (
  ClassifierConfig,
  ConfigError,
  EncoderConfig,
  LMConfig,
)
from efficient_attn.models.classifier import pool
from tests.layers.built import filled

B, T, VOCAB, CLASSES = 3, 8, 32, 5
BASE = dict(d_model=16, num_heads=2, num_layers=2, vocab_size=VOCAB)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
LABELS = jnp.array([4, 0, 2])
ROWS = {
  'mean': dict(pooling='mean'),
  'first': dict(pooling='first'),
  'last': dict(pooling='last'),
  'causal': dict(pooling='last', causal=True),
}


def config_of(**changes):
  return ClassifierConfig(**BASE | dict(num_classes=CLASSES) | changes)


def build(**changes):
  return filled(lambda: models.build(config_of(**changes), rngs=nnx.Rngs(0)))


@jax.jit
def call(model, tokens, **options):
  return model(tokens, **options)


def test_pooling_by_hand():
  x = jnp.arange(2.0 * 4 * 3).reshape(2, 4, 3)
  real = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]])
  x = x.at[0, 3].set(jnp.nan)  # padding may hold anything
  for pooling, wanted in (
    ('mean', (x[0, 1] + x[0, 2]) / 2),
    ('first', x[0, 1]),
    ('last', x[0, 2]),
  ):
    found = pool(x, real, pooling)
    np.testing.assert_array_equal(found, jnp.stack([wanted, jnp.zeros(3)]))


@pytest.mark.parametrize('name', sorted(ROWS))
def test_padding_on_either_side_changes_nothing(name):
  model = build(position='learned', max_len=T, **ROWS[name])
  ids = jnp.asarray(np.arange(T) < 5, jnp.int32)[None].repeat(B, 0)
  logits = call(model, TOKENS[:, :5])
  assert logits.shape == (B, CLASSES) and logits.dtype == jnp.float32
  for shift in (0, 3):
    found = call(
      model,
      jnp.roll(TOKENS, shift, 1),
      segment_ids=jnp.roll(ids, shift, 1),
    )
    np.testing.assert_allclose(found, logits, atol=1e-5)


@pytest.mark.parametrize('name', sorted(ROWS))
def test_every_token_counts(name):
  model = build(**ROWS[name])
  logits = call(model, TOKENS)
  for t in (0, T - 1):
    other = call(model, TOKENS.at[:, t].add(1) % VOCAB)
    assert (other != logits).any(-1).all()


@pytest.mark.parametrize('name', ['mean', 'causal'])
def test_it_learns_a_batch(name):
  model = models.init(config_of(**ROWS[name]), jax.random.key(0))
  graphdef, params = nnx.split(model)
  tx = optax.adam(1e-2)

  def loss(params):
    logits = nnx.merge(graphdef, params)(TOKENS)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, LABELS
    ).mean()

  @jax.jit
  def run(params):
    def body(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(body, (params, tx.init(params)), length=30)[1]

  losses = run(params)
  assert losses[0] == pytest.approx(np.log(CLASSES)) and losses[-1] < 0.05


@pytest.mark.parametrize('norm_position', ['pre', 'post'])
@pytest.mark.parametrize('causal', [True, False])
def test_its_parameters_are_those_of_a_trained_model(causal, norm_position):
  shape = BASE | dict(norm_position=norm_position, position='learned')
  start = (LMConfig if causal else EncoderConfig)(**shape)

  def sizes(config):
    state = nnx.state(models.abstract(config))
    return {path: p.shape for path, p in nnx.to_flat_state(state)}

  found = sizes(ClassifierConfig(**shape, causal=causal))
  found = {path: size for path, size in found.items() if path[0] != 'head'}
  assert found == sizes(start)


def test_wrong_configurations():
  for changes, message in (
    ({'num_classes': 0}, 'model.num_classes=0 must be >= 1'),
    ({'pooling': 'max'}, "model.pooling='max' is unknown; .*first, last, mean"),
    ({'pooling': 'first', 'causal': True}, "'first' of a causal model sees"),
  ):
    with pytest.raises(ConfigError, match=message):
      configs.resolve({'model': {'name': 'classifier'} | changes})
  with pytest.raises(ConfigError, match="'fox' is causal only"):
    build(pattern=('fox',))
  build(pattern=('fox',), causal=True, pooling='last')
  with pytest.raises(ConfigError, match="'fnet' is a mixer of encoders"):
    build(pattern=('fnet',), causal=True)
