"""Layers that read the keys and values of another layer of their pattern."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models, sharding
from efficient_attn.config import ConfigError, LMConfig, ViTConfig
from efficient_attn.layers.context import Context
from tests.layers.built import filled
from tests.layers.compact_cases import (
  B,
  N,
  T,
  assert_close,
  inputs,
  make,
  values,
)
from tests.oracles import compact as oracles


def test_a_shared_layer_reads_the_keys_of_another():
  with jax.enable_x64(True):
    source = make('attention', num_kv_heads=2)
    reader = make('attention', num_kv_heads=2, shared_kv=True)
    below, x = inputs(), inputs(seed=1)

    @jax.jit
    def run(x, below):
      def read(below, x, **caches):
        cache, empty = caches.get('cache'), caches.get('empty')
        y, cache, shared = source.mix_sharing(below, Context(), cache, {})
        z, empty, passed = reader.mix_sharing(x, Context(), empty, shared)
        assert passed is shared and not jax.tree.leaves(empty)
        return (y, z), cache

      cache, parts = source.init_cache(B, T, x.dtype), []
      empty = reader.init_cache(B, T, x.dtype)
      assert jax.tree.leaves(empty) == []
      for a, b in itertools.pairwise((0, T - 1, T)):
        y, cache = read(below[:, a:b], x[:, a:b], cache=cache, empty=empty)
        parts.append(y)
      parts = jax.tree.map(lambda *y: jnp.concatenate(y, axis=1), *parts)
      return read(below, x)[0], parts

    p, q = values(source), values(reader)
    expected = (
      oracles.mha(p, below, heads=N),
      oracles.shared(q, x, p, below, heads=N),
    )
    for ours in run(x, below):
      for y, wanted in zip(ours, expected, strict=True):
        assert_close(y, wanted)
  assert not any(name.startswith('qkv') for name in q)
  with pytest.raises(ValueError, match='needs a pattern'):
    reader(x)


SHARING = dict(
  d_model=16,
  num_heads=2,
  num_layers=7,
  vocab_size=64,
  pattern=('attention', 'gla', 'attention:shared'),
  mixers={'attention:shared': {'shared_kv': True}, 'gla': {'chunk_size': 4}},
)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 64)


def sharing(**changes):
  config = LMConfig(**SHARING | changes)
  return filled(lambda: models.build(config, rngs=nnx.Rngs(0)))


@pytest.mark.in_turn
def test_a_model_that_shares_decodes_what_it_computes():
  model = sharing()

  @jax.jit
  def run(model, tokens):
    cache, parts = model.init_cache(B, T), []
    for a, b in itertools.pairwise((0, 6, 7, T)):
      y, cache = model(tokens[:, a:b], cache=cache)
      parts.append(y)
    return model(tokens)[0], jnp.concatenate(parts, axis=1)

  whole, parts = run(model, TOKENS)
  np.testing.assert_allclose(parts, whole, atol=1e-5)


@pytest.mark.in_turn
def test_scanned_unrolled_rematerialised_and_packed_agree():
  changes = dict(num_layers=4, pattern=('attention', 'attention:shared'))
  scanned = sharing(**changes)
  unrolled = sharing(**changes, scan_layers=False, remat='full')
  params = nnx.to_pure_dict(nnx.state(scanned))
  stacked = params['stack']['periods']
  params['stack']['periods'] = {
    i: jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(2)
  }
  unrolled = nnx.merge(nnx.graphdef(unrolled), params)
  ids = jnp.asarray(np.repeat([1, 2, 3], (4, 1, 6))[None].repeat(B, 0))

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def grads(model, ids):
    y, _ = model(TOKENS, segment_ids=ids)
    return jnp.mean(jnp.sin(y)), y

  (a, y), (b, z) = grads(scanned, ids), grads(unrolled, ids)
  np.testing.assert_allclose(y, z, atol=1e-5)
  a, b = a.embed.table[...], b.embed.table[...]
  np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  last = jax.jit(lambda m, t: m(t)[0])(scanned, TOKENS[:, 5:])
  np.testing.assert_allclose(y[:, 5:], last, atol=1e-5)


def test_an_encoder_shares_too():
  config = ViTConfig(
    d_model=16,
    num_heads=2,
    num_layers=2,
    pattern=('attention', 'attention:shared'),
    mixers=SHARING['mixers'],
  )
  model = filled(lambda: models.build(config, rngs=nnx.Rngs(0)))
  image = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
  run = jax.jit(model)
  y = run(image)
  chex.assert_tree_all_finite(y)
  assert (y != run(image.at[:, -1].add(1))).any()


def test_sharing_halves_the_cache():
  def size(pattern):
    mixers = SHARING['mixers']
    model = models.abstract(
      LMConfig(**SHARING | dict(pattern=pattern, num_layers=4, mixers=mixers))
    )
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(B, 100)))
    return sum(leaf.size for leaf in leaves if leaf.ndim > 1)

  alone = size(('attention',))
  assert alone == 4 * 2 * B * 100 * 16
  assert 2 * size(('attention', 'attention:shared')) == alone
  assert 4 * size(('attention', *['attention:shared'] * 3)) == alone


def test_a_model_that_shares_is_sharded():
  model = sharing(num_layers=2, pattern=('attention', 'attention:shared'))
  expected = jax.jit(lambda m, t: m(t)[0])(model, TOKENS)
  mesh = sharding.make_mesh('data=2,tensor=2', jax.devices()[:4])
  placed = jax.tree.map(
    lambda p: p.replace(
      jax.device_put(
        p[...], jax.NamedSharding(mesh, sharding.param_spec(p.axes))
      )
    ),
    nnx.state(model),
    is_leaf=lambda p: isinstance(p, nnx.Variable),
  )
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, sharding.activation_spec(('batch', None)))
    tokens = jax.device_put(TOKENS, rows)
    model = nnx.merge(nnx.graphdef(model), placed)
    y = jax.jit(lambda m, t: m(t)[0])(model, tokens)
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
  'pattern,options,message',
  [
    (('attention:shared', 'attention'), {}, 'no attention layer before it'),
    (('gla', 'attention:shared'), {}, 'no attention layer before it'),
    (('mla', 'attention:shared'), {}, 'no attention layer before it'),
    (('attention', 'attention:shared'), dict(head_dim=4), 'the same options'),
    (('attention', 'window:shared'), {}, 'is not possible for window'),
  ],
  ids=str,
)
def test_patterns_that_cannot_share(pattern, options, message):
  (name,) = (name for name in pattern if name.endswith(':shared'))
  mixers = {name: dict(shared_kv=True) | options}
  with pytest.raises(ConfigError, match=message):
    models.abstract(LMConfig(**SHARING | dict(pattern=pattern, mixers=mixers)))
