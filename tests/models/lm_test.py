"""The language model: cache, scan, norms, positions, counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models
from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.models import cost
from tests.layers.built import filled

B, T, VOCAB = 2, 12, 64

BASE = dict(
  d_model=16,
  num_heads=2,
  num_layers=3,
  vocab_size=VOCAB,
  pattern=('gla', 'attention'),
  mixers={'gla': {'chunk_size': 4}},
)


def build(**changes):
  config = LMConfig(**BASE | changes)
  return filled(lambda: models.build(config, rngs=nnx.Rngs(0)))


@jax.jit
def call(model, tokens, cache=None, key=None):
  return model(tokens, cache=cache, key=key)


TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)

VARIANTS = [
  dict(num_layers=5),
  dict(scan_layers=False, norm_position='post', norm='layernorm'),
  dict(position='learned', max_len=T, ffn='none'),
  dict(position='sinusoidal', ffn='mlp', activation='gelu'),
  dict(tie_embeddings=False, pattern=('window',), mixers={}),
  dict(remat='full', pattern=('retention', 'linear'), mixers={}),
]


@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_cached_equals_uncached(changes):
  model = build(**changes)
  whole, none = call(model, TOKENS)
  assert none is None and whole.shape == (B, T, VOCAB)
  assert whole.dtype == jnp.float32
  cache = model.init_cache(B, T)
  parts = []
  for a, b in itertools.pairwise((0, 6, 7, T)):
    logits, cache = call(model, TOKENS[:, a:b], cache)
    parts.append(logits)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-4)
  assert cache.cursor.length == T


def test_a_hybrid_keeps_segments_apart():
  """Masks, recurrences, convolutions and mini-batches cut at the same places.

  An id that comes again is another segment, and id 0 is padding.
  """
  pattern = ('attention', 'gla', 'mamba2', 'window', 'ttt_linear', 'deltanet')
  model = build(pattern=pattern, num_layers=6, mixers={})
  lengths = (3, 2, 1, 4, 2)
  ids = np.repeat([3, 3, 9, 3, 0], lengths)
  cuts = np.cumsum((0, 5, 1, 4))  # of the segments before the padding
  positions = np.concatenate(
    [np.arange(b - a) for a, b in itertools.pairwise(cuts)]
  )
  positions = jnp.append(positions, jnp.zeros(2, int)).astype(jnp.int32)

  @jax.jit
  def packed(tokens):
    return model(tokens, positions=positions, segment_ids=jnp.tile(ids, (B, 1)))

  found, _ = packed(TOKENS)
  for a, b in itertools.pairwise(cuts):
    alone, _ = call(model, jnp.pad(TOKENS[:, a:b], ((0, 0), (0, T - b + a))))
    np.testing.assert_allclose(found[:, a:b], alone[:, : b - a], atol=1e-4)
  other, _ = packed(TOKENS.at[:, 10:].set(5))
  np.testing.assert_array_equal(other[:, :10], found[:, :10])


@pytest.mark.parametrize('num_layers', [4, 5])
def test_scanned_equals_unrolled(num_layers):
  scanned = build(num_layers=num_layers)
  unrolled = build(num_layers=num_layers, scan_layers=False)
  params = nnx.to_pure_dict(nnx.state(scanned))
  stacked = params['stack']['periods']
  params['stack']['periods'] = {
    i: jax.tree.map(lambda x, i=i: x[i], stacked)
    for i in range(num_layers // 2)
  }
  unrolled = nnx.merge(nnx.graphdef(unrolled), params)
  np.testing.assert_allclose(
    call(scanned, TOKENS)[0], call(unrolled, TOKENS)[0], atol=1e-5
  )


def test_layers_differ_at_initialisation():
  model = models.init(LMConfig(**BASE | dict(num_layers=4)), jax.random.key(0))
  periods = nnx.to_pure_dict(nnx.state(model))['stack']['periods']
  for leaf in jax.tree.leaves(periods):
    if leaf.any() and (leaf != 1).any():  # not a zero bias or a unit scale
      assert (leaf[0] != leaf[1]).any()


def test_dropout_needs_a_key_and_follows_it():
  model = build(dropout=0.5)
  keys = jax.random.split(jax.random.key(0))
  plain = call(model, TOKENS)[0]
  np.testing.assert_array_equal(call(model, TOKENS)[0], plain)
  one = call(model, TOKENS, key=keys[0])[0]
  np.testing.assert_array_equal(call(model, TOKENS, key=keys[0])[0], one)
  assert (call(model, TOKENS, key=keys[1])[0] != one).any()
  assert (one != plain).any()


def test_bfloat16_activations_float32_logits():
  model = build(dtype='bfloat16')
  logits, _ = call(model, TOKENS)
  assert logits.dtype == jnp.float32
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(model))
  np.testing.assert_allclose(logits, call(build(), TOKENS)[0], atol=0.15)


def test_too_long_for_learned_positions():
  with pytest.raises(ValueError, match='raise model.max_len'):
    build(position='learned', max_len=T - 1)(TOKENS)


def test_parameter_count_by_hand():
  config = LMConfig(
    d_model=8,
    num_heads=2,
    num_layers=3,
    vocab_size=32,
    ffn='mlp',
    mixers={'attention': {'num_kv_heads': 1}},
  )
  attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
  block = attention + 2 * 8 * 32 + 2 * 8
  assert models.parameter_count(config) == 32 * 8 + 3 * block + 8


@pytest.mark.parametrize('num_layers', [4, 5])
@pytest.mark.parametrize('scan_layers', [True, False])
def test_flops_by_hand(num_layers, scan_layers):
  model = build(
    num_layers=num_layers,
    scan_layers=scan_layers,
    pattern=('attention',),
    mixers={'attention': {'implementation': 'reference'}},
    ffn='mlp',
    ffn_dim=24,
  )
  projections = 4 * 16 * 16 + 2 * 16 * 24
  scores = 2 * 16 * T
  wanted = 2 * B * T * (num_layers * (projections + scores) + 16 * VOCAB)
  assert cost.flops(lambda m, t: m(t)[0], model, TOKENS) == wanted


def test_flops_refuse_unknown_loops():
  def f(x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

  with pytest.raises(cost.UnknownLengthError, match='unknown length'):
    cost.flops(f, jnp.ones((2, 2)))


def test_largest_array():
  assert cost.largest_array(lambda x: (x[:, None] * x).sum(), jnp.ones(9)) == 81


def test_unknown_names():
  with pytest.raises(ConfigError, match="model.norm='rms' .* 'rmsnorm'"):
    build(norm='rms')
  with pytest.raises(ConfigError, match="model.pattern='gal'"):
    build(pattern=('gal',), mixers={})


@pytest.mark.parametrize(
  'remat,again', [('none', 0), ('dots', 0), ('kernels', 0), ('full', 1)]
)
def test_a_policy_that_keeps_kernels_does_not_run_them_again(remat, again):
  def calls(remat):
    model = build(num_layers=1, remat=remat)
    gradient = jax.grad(lambda model: jnp.sum(model(TOKENS)[0]))
    found = cost.equations(jax.make_jaxpr(gradient)(model).jaxpr)
    return sum(eqn.primitive.name == 'per_platform' for eqn in found)

  assert calls(remat) == calls('none') + again
