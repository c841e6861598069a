"""The channel mix of RWKV against its equations, and its state in a model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.config import ConfigError, EncoderConfig, LMConfig
from efficient_attn.layers.block import Block
from efficient_attn.layers.channel_mix import ChannelMix
from efficient_attn.layers.ffn import ACTIVATIONS
from efficient_attn.models.lm import LM
from tests.layers.built import filled

B, T, D, F = 2, 9, 8, 12
MODEL = LMConfig(
  vocab_size=17,
  d_model=D,
  num_heads=2,
  num_layers=5,
  pattern=('rwkv4', 'attention'),
  mixers={'rwkv4': {'chunk_size': 4}},
  ffn='channel_mix',
  activation='relu2',
)


def test_equations():
  relu2 = ACTIVATIONS['relu2']
  ffn = filled(lambda: ChannelMix(D, F, relu2, bias=True, rngs=nnx.Rngs(0)))
  x = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
  before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)

  def project(layer, x):
    return x @ np.asarray(layer.weight[...]) + np.asarray(layer.bias[...])

  def mixed(mu):
    mu = np.asarray(mu[...])
    return mu * x + (1 - mu) * before

  hidden = np.maximum(project(ffn.up, mixed(ffn.mix_key)), 0) ** 2
  gate = project(ffn.receptance, mixed(ffn.mix_receptance))
  wanted = project(ffn.down, hidden) / (1 + np.exp(-gate))
  np.testing.assert_allclose(ffn(x)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope='module')
def model():
  return filled(lambda: LM(MODEL, rngs=nnx.Rngs(0)))


def tokens():
  return jnp.asarray(np.random.default_rng(2).integers(17, size=(B, T)))


def test_cache_continues_the_sequence(model):
  cache = model.init_cache(B, T)
  parts = []
  for a, b in itertools.pairwise((0, 4, 5, 6, T)):
    y, cache = jax.jit(lambda x, c: model(x, cache=c))(tokens()[:, a:b], cache)
    parts.append(y)
  expected = model(tokens())[0]
  np.testing.assert_allclose(
    jnp.concatenate(parts, 1), expected, rtol=1e-4, atol=1e-5
  )


def test_packed_equals_separate(model):
  ids = jnp.asarray(np.repeat([1, 2, 0], (4, 3, 2))[None].repeat(B, 0))
  y, _ = model(tokens(), segment_ids=ids)
  for a, b in ((0, 4), (4, 7)):
    alone, _ = model(tokens()[:, a:b])
    np.testing.assert_allclose(y[:, a:b], alone, rtol=1e-4, atol=1e-5)


def test_prompts_that_begin_with_padding(model):
  ids = jnp.asarray(np.repeat([0, 1], (3, 3))[None].repeat(B, 0))
  cache = model.init_cache(B, T)
  _, cache = model(tokens()[:, :6], segment_ids=ids, cache=cache)
  y, _ = model(tokens()[:, 6:], cache=cache)
  expected, _ = model(tokens()[:, 3:])
  np.testing.assert_allclose(y, expected[:, 3:], rtol=1e-4, atol=1e-5)


def test_an_encoder_has_none():
  config = EncoderConfig(d_model=D, num_heads=2, ffn='channel_mix')
  with pytest.raises(ConfigError, match='model.ffns.channel_mix: it is of dec'):
    nnx.eval_shape(lambda: Block(config, 'attention', False, rngs=nnx.Rngs(0)))
