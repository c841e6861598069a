"""The caches of all causal mixers: what a decoding step may do with them."""

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
