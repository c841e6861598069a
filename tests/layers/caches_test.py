"""The caches of all causal mixers: what a decoding step may do with them."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend import core

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
