"""Models of experts: packed, cached, in rows apart, adapted, at any remat."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn import models
from efficient_attn.config import LMConfig, LoraConfig
from efficient_attn.decode import rows
from efficient_attn.layers.adapter import adapt
from tests.layers.built import filled

B, T, VOCAB = 2, 8, 32
BASE = dict(
  d_model=16,
  num_heads=2,
  num_layers=3,
  vocab_size=VOCAB,
  first_ffns=('glu',),
  ffn='moe',
  ffn_dim=16,
  ffns={
    'moe': dict(
      num_experts=4,
      shared_dim=8,
      bias=True,
      router=dict(bias=True, correction=True),
    )
  },
)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)


def build(**changes):
  config = LMConfig(**BASE | changes)
  return filled(lambda: models.build(config, rngs=nnx.Rngs(0)))


@jax.jit
def call(model, tokens, **options):
  return model(tokens, **options)


def test_cached_equals_uncached():
  model = build()
  whole, _ = call(model, TOKENS)
  cache, found = model.init_cache(B, T), []
  for a, b in itertools.pairwise((0, 5, 6, T)):
    logits, cache = call(model, TOKENS[:, a:b], cache=cache)
    found.append(logits)
  np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-4)


def test_packed_equals_separate_and_padding_may_hold_anything():
  model = build()
  ids = jnp.tile(jnp.asarray([3, 3, 3, 5, 5, 5, 0, 0]), (B, 1))
  positions = jnp.asarray([0, 1, 2, 0, 1, 2, 0, 0])
  found, _ = call(model, TOKENS, segment_ids=ids, positions=positions)
  for a, b in ((0, 3), (3, 6)):
    alone, _ = call(model, jnp.pad(TOKENS[:, a:b], ((0, 0), (0, T - b + a))))
    np.testing.assert_allclose(found[:, a:b], alone[:, : b - a], atol=1e-4)

  def loss(model, table):
    model.embed.table[...] = table
    logits, _ = model(TOKENS, segment_ids=ids, positions=positions)
    return jnp.sum(logits[:, :6] ** 2)

  table = model.embed.table[...]
  tokens_of_padding = np.setdiff1d(TOKENS[:, 6:], TOKENS[:, :6])
  assert len(tokens_of_padding)
  params = jax.tree.leaves(jax.jit(jax.grad(loss))(model, table))
  assert all(jnp.isfinite(x).all() for x in params)


def test_rows_of_a_cache_apart_decode_alike():
  """There the weights are shared by a batch of products."""
  model = build()
  _, cache = call(model, TOKENS[:, :4], cache=model.init_cache(B, T))
  wanted, _ = call(model, TOKENS[:, 4:5], cache=cache)
  apart = rows.apart(model, cache, B)
  found, _ = jax.jit(rows.step)(model, TOKENS[:, 4], apart)
  np.testing.assert_allclose(found, wanted[:, 0], atol=1e-4)


def test_recomputed_in_a_scan_and_unrolled_have_one_gradient():
  def gradient(model):
    return jax.jit(jax.grad(lambda m: jnp.sum(m(TOKENS)[0] ** 2)))(model)

  scanned = gradient(build(remat='full')).stack.periods.blocks[0]
  unrolled = build(scan_layers=False)
  for i in range(2):
    own = jax.tree.map(lambda x, i=i: x[i], build().stack.periods)
    unrolled.stack.periods[i] = own
  unrolled = gradient(unrolled).stack.periods
  for i in range(2):
    a = jax.tree.map(lambda x, i=i: x[i], scanned)
    pairs = zip(
      jax.tree.leaves_with_path(a),
      jax.tree.leaves(unrolled[i].blocks[0]),
      strict=True,
    )
    for (path, x), y in pairs:
      name = jax.tree_util.keystr(path)
      np.testing.assert_allclose(
        x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max() + 1e-6, err_msg=name
      )


def test_adapters_of_the_shared_expert_change_nothing_at_first():
  model = build()
  before, _ = call(model, TOKENS)
  config = LoraConfig(rank=2, match=('*.shared.*',))
  adapt(model, config, rngs=nnx.Rngs(1))
  np.testing.assert_array_equal(call(model, TOKENS)[0], before)


def test_parameters_by_hand():
  d, f, e, s = 16, 16, 4, 8
  experts = e * (3 * d * f + 2 * f + d) + d * e + 2 * e + 3 * d * s + 2 * s + d
  attention, norms = 4 * d * d, 2 * d
  dense = 3 * d * f
  wanted = VOCAB * d + 3 * (attention + norms) + dense + 2 * experts + d
  assert models.parameter_count(LMConfig(**BASE)) == wanted
