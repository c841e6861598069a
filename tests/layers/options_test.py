"""Options of norms, embeddings, logits and QK norms mean what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models
from efficient_attn.config import ConfigError, resolve
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers import build_mixer
from efficient_attn.layers.norm import LayerNorm, RMSNorm

D = 8
X = np.random.default_rng(0).normal(size=(2, 5, D)).astype(np.float32)


def tiny(**model):
  values = dict(d_model=D, num_heads=2, num_layers=1, vocab_size=11, ffn='none')
  return resolve({'model': values | model}).model


def rms(x, eps=1e-6, axis=-1):
  return x / np.sqrt((x**2).mean(axis, keepdims=True) + eps)


def test_a_zero_centered_scale_keeps_its_digits_in_bfloat16():
  norm = RMSNorm(D, zero_centered=True, eps=0.5)
  np.testing.assert_allclose(norm(X), rms(X, 0.5), rtol=1e-5)
  small = jnp.full(D, 2.0**-12, jnp.bfloat16)
  norm.scale[...] = small
  np.testing.assert_allclose(norm(X), rms(X, 0.5) * (1 + 2.0**-12), rtol=1e-6)


def test_norms_without_parameters():
  assert not jax.tree.leaves(nnx.state(RMSNorm(D, learned=False)))
  np.testing.assert_allclose(RMSNorm(D, learned=False)(X), rms(X), rtol=1e-5)
  norm = LayerNorm(D, bias=False, eps=0.25)
  assert len(jax.tree.leaves(nnx.state(norm))) == 1
  wanted = (X - X.mean(-1, keepdims=True)) / np.sqrt(
    X.var(-1, keepdims=True) + 0.25
  )
  np.testing.assert_allclose(norm(X), wanted, rtol=1e-4, atol=1e-6)


def test_every_norm_of_a_model_has_the_options():
  config = tiny(norms={'eps': 0.5, 'zero_centered': True}, ffn='glu')
  model = models.build(config, rngs=nnx.Rngs(0))
  found = [m for _, m in nnx.iter_modules(model) if isinstance(m, RMSNorm)]
  assert [m.eps for m in found] == [0.5] * 3
  assert all(m.zero_centered for m in found)


@pytest.mark.parametrize(
  'model,message',
  [
    (
      dict(norms={'bias': True}),
      r'model.norms.bias=True is not an option of rmsnorm',
    ),
    (dict(norms={'eps': -1.0}), r'model.norms.eps=-1.0 must be'),
    (dict(norm='rms'), r"model.norm='rms' is unknown"),
    (dict(embedding={'scale': 0}), r'model.embedding.scale=0'),
    (dict(logits={'soft_cap': -3.0}), r'model.logits.soft_cap=-3.0'),
    (dict(logits={'cap': 3.0}), r'model.logits.cap=3.0 is not a known key'),
    (
      dict(mixers={'attention': {'rotary': {'scaling': {'type': 'su'}}}}),
      r"rotary.scaling.type='su' is unknown",
    ),
    (
      dict(mixers={'attention': {'cosine': True, 'scale': 1.0}}),
      r'scale=1.0: cosine=True learns its own',
    ),
  ],
)
def test_mistakes(model, message):
  with pytest.raises(ConfigError, match=message):
    models.abstract(tiny(**model))


def test_embeddings_and_logits():
  config = tiny(
    embedding=dict(scale=3.0, norm=True),
    logits=dict(scale=0.5, bias=True, soft_cap=2.0),
  )
  model = models.build(config, rngs=nnx.Rngs(0))
  bias = np.linspace(-1, 1, 11).astype(np.float32)
  model.logit_bias[...] = jnp.asarray(bias)
  table = np.asarray(model.embed.table[...])
  tokens = np.array([[1, 4, 4]])
  np.testing.assert_allclose(
    model.embed(tokens, jnp.float32), 3 * table[tokens], rtol=1e-6
  )
  seen = []
  run = model.stack.__class__.__call__

  def spy(self, x, *args):
    seen.append(x)
    return run(self, x, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(model.stack.__class__, '__call__', spy)
    hidden, _ = model.hidden(tokens)
    logits, _ = model(tokens)
  np.testing.assert_allclose(seen[0], rms(3 * table[tokens]), rtol=1e-5)
  raw = 0.5 * np.asarray(hidden) @ table.T + bias
  np.testing.assert_allclose(logits, 2 * np.tanh(raw / 2), rtol=1e-5, atol=1e-6)


def test_a_joint_norm_is_of_all_heads():
  mixer = build_mixer(
    'attention',
    d_model=D,
    num_heads=2,
    rngs=nnx.Rngs(0),
    qk_norm=True,
    qk_norms={'joint': True, 'eps': 0.5},
    num_kv_heads=1,
  )
  heads = np.random.default_rng(0).normal(size=(1, 3, 2, 4)).astype(np.float32)
  np.testing.assert_allclose(
    mixer.query_norm(heads), rms(heads, 0.5, (-2, -1)), rtol=1e-5
  )
  assert mixer.query_norm.scale.shape == (2, 4)
  assert mixer.key_norm.scale.shape == (1, 4)


def test_the_scale_of_logits_is_that_of_queries():
  def build(**options):
    return build_mixer(
      'attention', d_model=D, num_heads=2, rngs=nnx.Rngs(0), **options
    )

  found, plain = build(scale=0.25)(X)[0], build()
  weight = plain.qkv.query.weight
  weight[...] = weight[...] * 0.25 * 2  # in place of 1 / sqrt(4)
  np.testing.assert_allclose(found, plain(X)[0], rtol=1e-4, atol=1e-6)
  assert np.abs(found - build()(X)[0]).max() > 1e-3


def test_scaled_alibi():
  mixer = build_mixer(
    'attention',
    d_model=D,
    num_heads=2,
    rngs=nnx.Rngs(0),
    position='alibi',
    alibi={'scaled': True},
  )
  plain = build_mixer(
    'attention', d_model=D, num_heads=2, rngs=nnx.Rngs(0), position='alibi'
  )
  found, wanted = (
    m.bias(0, Context(), None, 3, 3).dense(3, 3) for m in (mixer, plain)
  )
  np.testing.assert_allclose(found, wanted / 2, rtol=1e-6)
