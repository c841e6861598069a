"""Modules for tests, made without compiling how they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.layers.mixers import build_mixer


def built(name, **options):
  """A mixer as its paper initialises it.

  Op by op: compiling the draws of each mixer as one program takes longer.
  """
  return build_mixer(name, rngs=nnx.Rngs(0), **options)


def filled(build, dtype=np.float32):
  """The module that `build` returns, with numbers of no distribution."""
  rng = np.random.default_rng(0)

  def numbers(path, leaf):
    center = 'scale' in jax.tree_util.keystr(path)
    value = center + 0.2 * rng.standard_normal(leaf.shape)
    return jnp.asarray(value.astype(dtype))

  graphdef, params = nnx.split(nnx.eval_shape(build))
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(numbers, params))
