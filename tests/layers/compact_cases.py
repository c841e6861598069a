"""Softmax mixers in float64 that take no time to make."""

import numpy as np
from flax import nnx

from efficient_attn.layers.mixers import build_mixer
from tests.layers.built import filled

B, T, D, N = 2, 11, 32, 4


def build(name, d_model=D, num_heads=N, **options):
  return build_mixer(
    name, d_model=d_model, num_heads=num_heads, rngs=nnx.Rngs(0), **options
  )


def abstract(name, *args, **options):
  """A mixer with shapes in place of numbers."""
  return nnx.eval_shape(lambda: build(name, *args, **options))


def make(name, dtype=np.float64, **options):
  return filled(lambda: build(name, **options), dtype)


def flat(mixer):
  """The parameters of a mixer, arrays or their shapes, by path."""
  state = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
  return {'.'.join(map(str, path)): p.get_value() for path, p in state}


def values(mixer):
  return {
    name.removeprefix('weights.'): np.asarray(p, np.float64)
    for name, p in flat(mixer).items()
  }


def inputs(seed=0):
  return np.random.default_rng(seed).standard_normal((B, T, D))


def assert_close(y, expected, tolerance=1e-12):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * scale)
