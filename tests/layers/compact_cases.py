"""Softmax mixers in float64 that take no time to make."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.layers.mixers import build_mixer

B, T, D, N = 2, 11, 32, 4


def fill(build, dtype):
  """What `build` returns, with numbers that need no compilation."""
  rng = np.random.default_rng(0)

  def numbers(path, leaf):
    center = 'scale' in jax.tree_util.keystr(path)
    value = center + 0.2 * rng.standard_normal(leaf.shape)
    return jnp.asarray(value.astype(dtype))

  graphdef, params = nnx.split(nnx.eval_shape(build))
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(numbers, params))


def build(name, d_model=D, num_heads=N, **options):
  return build_mixer(
    name, d_model=d_model, num_heads=num_heads, rngs=nnx.Rngs(0), **options
  )


def abstract(name, *args, **options):
  """A mixer with shapes in place of numbers."""
  return nnx.eval_shape(lambda: build(name, *args, **options))


def make(name, dtype=np.float64, **options):
  return fill(lambda: build(name, **options), dtype)


def flat(mixer):
  """The parameters of a mixer, arrays or their shapes, by path."""
  state = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
  return {'.'.join(map(str, path)): p.get_value() for path, p in state}


def values(mixer):
  return {name: np.asarray(p, np.float64) for name, p in flat(mixer).items()}


def inputs(seed=0):
  return np.random.default_rng(seed).standard_normal((B, T, D))


def close(y, expected, tolerance=1e-12):
  error = np.abs(np.asarray(y) - expected).max() / np.abs(expected).max()
  return error < tolerance
