"""The encoder and decoder: cache, causality, padding, wrong configurations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.models.encoder_decoder import EncoderDecoder
from tests.layers.built import filled

B, S, T, VOCAB = 2, 7, 9, 32
BASE = dict(
  d_model=16,
  num_heads=2,
  num_layers=2,
  vocab_size=VOCAB,
  pattern=('attention', 'retention'),
  mixers={'retention': {'chunk_size': 4}},
)
KEYS = jax.random.split(jax.random.key(0), 3)
SOURCE = jax.random.randint(KEYS[0], (B, S), 0, VOCAB)
TARGET = jax.random.randint(KEYS[1], (B, T), 0, VOCAB)


@functools.cache
def plain():
  return build()


def recipe(encoder=None, **changes):
  config = LMConfig(**BASE | changes)
  if encoder is not None:
    encoder = LMConfig(**BASE | encoder)
  return lambda key: EncoderDecoder(config, encoder, rngs=nnx.Rngs(key))


def build(**changes):
  make = recipe(**changes)
  return filled(lambda: make(KEYS[2]))


@jax.jit
def forward(model, source, target, mask=None, key=None):
  memory = model.encode(source, source_mask=mask, key=key)
  logits, none = model(target, memory, source_mask=mask, key=key)
  assert none is None
  return logits


@jax.jit
def start(model, source, mask):
  memory = model.encode(source, source_mask=mask)
  return model.init_cache(memory, T, source_mask=mask)


@jax.jit
def step(model, target, cache):
  return model(target, cache=cache)


VARIANTS = {
  'plain': {},
  'other encoder': dict(
    num_layers=1, encoder=dict(pattern=('fnet',), mixers={})
  ),
  'post': dict(
    num_layers=1, norm_position='post', norm='layernorm', position='sinusoidal'
  ),
  'learned': dict(num_layers=1, position='learned', max_len=T, ffn='mlp'),
}


@pytest.mark.parametrize('name', sorted(VARIANTS))
def test_cached_equals_uncached(name):
  model = build(**VARIANTS[name]) if VARIANTS[name] else plain()
  mask = None
  if name == 'plain':
    mask = jnp.arange(S) < np.array([[S], [4]])
  whole = forward(model, SOURCE, TARGET, mask)
  assert whole.shape == (B, T, VOCAB) and whole.dtype == jnp.float32
  cache = start(model, SOURCE, mask)
  parts = []
  for a, b in itertools.pairwise((0, 4, 5, T)):
    logits, cache = step(model, TARGET[:, a:b], cache)
    parts.append(logits)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-4)
  assert cache['length'] == T


def test_what_each_target_sees():
  model = plain()
  logits = forward(model, SOURCE, TARGET)
  later = forward(model, SOURCE, TARGET.at[:, 5:].add(1) % VOCAB)
  np.testing.assert_array_equal(later[:, :5], logits[:, :5])
  assert (later[:, 5:] != logits[:, 5:]).any(-1).all()
  # Both halves see every source, also before and after the target's index.
  for s in (0, S - 1):
    changed = forward(model, SOURCE.at[:, s].add(1) % VOCAB, TARGET)
    assert (changed != logits).any(-1).all(), s


def test_padding_is_not_seen():
  model = plain()
  mask = jnp.arange(S) < np.array([[S], [4]])
  logits = forward(model, SOURCE, TARGET, mask)
  short = forward(model, SOURCE[1:, :4], TARGET[1:])
  np.testing.assert_allclose(logits[1:], short, atol=1e-5)
  np.testing.assert_allclose(
    logits[:1], forward(model, SOURCE[:1], TARGET[:1]), atol=1e-5
  )


def test_dropout_needs_a_key_and_follows_it():
  model = build(dropout=0.5, num_layers=1)
  calm = forward(model, SOURCE, TARGET)
  one, same, other = (
    forward(model, SOURCE, TARGET, None, key)
    for key in (KEYS[0], KEYS[0], KEYS[1])
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()
  assert (one != calm).any()


def test_parameters_by_hand():
  shared = dict(ffn='mlp', pattern=('attention',), mixers={})
  make = recipe(encoder=shared | dict(num_layers=1), **shared)
  model = nnx.eval_shape(lambda: make(KEYS[2]))
  size = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
  attention, ffn = 4 * 16 * 16, 8 * 16 * 16
  encoder = attention + ffn + 2 * 16 + 16
  assert size == VOCAB * 16 + encoder + 2 * (2 * attention + ffn + 3 * 16) + 16


def test_wrong_configurations():
  with pytest.raises(ConfigError, match='d_model=32 and the decoder 16'):
    build(encoder=dict(d_model=32))
  with pytest.raises(ConfigError, match='mixer of encoders'):
    build(pattern=('fnet',), mixers={})
  with pytest.raises(ConfigError, match='causal only'):
    build(encoder=dict(pattern=('fox',), mixers={}))
