"""Generation equals decoding without a cache; sampling keeps its promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import models
from efficient_attn.config import LMConfig
from efficient_attn.decode.generate import generate
from efficient_attn.decode.sampling import sample
from efficient_attn.layers.mixers import MIXERS

PROMPT = jax.random.randint(jax.random.key(3), (2, 5), 0, 32)


def model_of(*pattern):
  config = LMConfig(
    d_model=16, num_heads=2, num_layers=2, vocab_size=32, pattern=pattern
  )
  return models.init(config, jax.random.key(0))


# One row for each kind of cache; that every row's cache continues a sequence
# is tested with the mixers.
CACHES = (
  'attention',
  'window',
  'path',
  'linear',
  'gla',
  'mamba',
  'log_linear',
  'ttt_linear',
)


@pytest.mark.parametrize(
  'mixer',
  [
    *CACHES,
    *(
      pytest.param(name, marks=pytest.mark.exhaustive)
      for name, spec in MIXERS.items()
      if spec.causal and name not in CACHES
    ),
  ],
)
def test_greedy_equals_uncached(mixer):
  model = model_of(mixer)
  length = 12
  found = generate(
    model, PROMPT, jax.random.key(0), length=length, temperature=0
  )
  # One compilation serves every step: what follows a token cannot change it.
  tokens = jnp.pad(PROMPT, ((0, 0), (0, length)))
  forward = jax.jit(lambda tokens: model(tokens)[0])
  for t in range(PROMPT.shape[1], tokens.shape[1]):
    tokens = tokens.at[:, t].set(forward(tokens)[:, t - 1].argmax(-1))
  np.testing.assert_array_equal(found, tokens[:, PROMPT.shape[1] :])


def test_sampled_equals_uncached():
  model = model_of('gla', 'attention')
  key, length = jax.random.key(5), 12
  found = generate(model, PROMPT, key, length=length, temperature=0.9, top_k=9)
  tokens = jnp.pad(PROMPT, ((0, 0), (0, length)))
  forward = jax.jit(lambda tokens: model(tokens)[0])
  for t, step_key in enumerate(jax.random.split(key, length), PROMPT.shape[1]):
    logits = forward(tokens)[:, t - 1]
    new = sample(logits, step_key, temperature=0.9, top_k=9)
    tokens = tokens.at[:, t].set(new)
  np.testing.assert_array_equal(found, tokens[:, PROMPT.shape[1] :])


def test_length_one():
  model = model_of('gla')
  assert generate(model, PROMPT, jax.random.key(0), length=1).shape == (2, 1)


LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))


def draws(**options):
  keys = jax.random.split(jax.random.key(0), 4000)
  found = jax.vmap(lambda k: sample(LOGITS[None], k, **options)[0])(keys)
  return np.bincount(found, minlength=4) / len(keys)


@pytest.mark.parametrize(
  'options,wanted',
  [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    (dict(temperature=0.5), np.square([0.1, 0.4, 0.2, 0.3]) / 0.30),
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
    (dict(top_p=1e-6), [0, 1, 0, 0]),
    (dict(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
    (dict(temperature=0), [0, 1, 0, 0]),
  ],
  ids=str,
)
def test_sample_frequencies(options, wanted):
  np.testing.assert_allclose(draws(**options), wanted, atol=0.03)
