"""The caches of all causal mixers: what a decoding step may do with them."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend import core

from efficient_attn.layers.cache import can_rewind, rewind
from efficient_attn.layers.mixers import MIXERS, build_mixer
from tests.layers.built import built

CAUSAL = [name for name, spec in MIXERS.items() if spec.causal]
SIZES = dict(d_model=16, num_heads=2)


@pytest.mark.parametrize('name', CAUSAL)
def test_every_buffer_is_its_own(name):
  """So that a step can donate the cache: nothing is there twice."""
  mixer = nnx.eval_shape(lambda: build_mixer(name, rngs=nnx.Rngs(0), **SIZES))
  trace = jax.make_jaxpr(lambda mixer: mixer.init_cache(2, 8, jnp.float32))
  jaxpr = trace(mixer).jaxpr
  made = [v for v in jaxpr.outvars if isinstance(v, core.Var)]
  assert len(set(made)) == len(made) and not set(made) & set(jaxpr.invars)


@pytest.mark.parametrize('name', ['attention', 'mesa', 'lact'])
def test_a_step_donates_its_cache(name):
  mixer = built(name, **SIZES)
  step = jax.jit(lambda x, cache: mixer(x, cache=cache), donate_argnums=1)
  cache = mixer.init_cache(2, 8, jnp.float32)
  for _ in range(2):
    before = cache
    y, cache = step(jnp.ones((2, 1, 16)), cache)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
  assert jnp.isfinite(y).all()


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.exhaustive if i % 4 else ())
    for i, name in enumerate(CAUSAL)
  ],
)
def test_a_step_keeps_the_types_of_the_cache_also_under_x64(name):
  """So that decoding can be a scan."""

  def run(x):
    mixer = build_mixer(name, rngs=nnx.Rngs(0), **SIZES)
    caches = [mixer.init_cache(2, 8, x.dtype)]
    for length in (3, 1):
      caches.append(mixer(x[:, :length], cache=caches[-1])[1])
    return caches

  with jax.enable_x64(True):
    first, *later = jax.eval_shape(
      run, jax.ShapeDtypeStruct((2, 3, 16), jnp.float64)
    )
  for cache in later:
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, first)


# Those whose cache is of tokens, or of the last of them.
REWOUND = [
  name
  for name in CAUSAL
  if can_rewind(
    nnx.eval_shape(
      lambda name=name: build_mixer(name, rngs=nnx.Rngs(0), **SIZES).init_cache(
        2, 8, jnp.float32
      )
    ),
    2,
  )
]


@pytest.mark.parametrize('name', REWOUND)
def test_a_cache_rewinds_to_any_token(name):
  """Here for two layers in a stack."""
  layers = nnx.vmap(lambda key: build_mixer(name, rngs=nnx.Rngs(key), **SIZES))(
    jax.random.split(jax.random.key(0), 2)
  )
  x = jax.random.normal(jax.random.key(1), (2, 5, 16))

  @jax.jit
  def read(cache, x):
    return jax.vmap(lambda m, c: m(x, cache=c)[1])(layers, cache)

  before = jax.vmap(lambda m: m.init_cache(2, 8, jnp.float32))(layers)
  before = read(before, x[:, :3])
  after = read(before, x[:, 3:])
  wanted = before, read(before, x[:, 3:4]), after
  for count, cache in enumerate(wanted):
    found = rewind(before, after, 2, count)
    chex.assert_trees_all_close(found, cache, atol=1e-6)


def test_what_caches_can_rewind():
  assert {'attention', 'window', 'mla'} <= set(REWOUND)
  assert not {'gla', 'fox', 'path', 'moba', 'mamba'} & set(REWOUND)
