"""Mixers that learn at test time, whole, against loops from their code.

In float64 from the input to the output: TTT as in ttt-lm-pytorch and
ttt-lm-jax for the Transformer backbone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.layers.built import built
from tests.oracles import fast_weights as oracle

B, T, D, N, C = 2, 11, 16, 2, 4
# Fast weights and rates are used in float32, whatever the input.
TOLERANCE = 3e-6


@functools.cache
def make(name, **options):
  """A mixer with noise on its parameters, as float64."""
  mixer = built(name, d_model=D, num_heads=N, chunk_size=C, **options)
  rng = np.random.default_rng(1)
  graphdef, params = nnx.split(mixer)
  noisy = [
    np.asarray(p, np.float64) + 0.2 * rng.standard_normal(p.shape)
    for p in jax.tree.leaves(params)
  ]
  return nnx.merge(
    graphdef, jax.tree.unflatten(jax.tree.structure(params), noisy)
  )


def inputs():
  return np.random.default_rng(2).standard_normal((B, T, D))


def run(mixer, x):
  call = jax.jit(lambda mixer, x: mixer(x)[0])
  with jax.enable_x64(True):
    return np.asarray(call(*jax.tree.map(jnp.asarray, (mixer, x))))


def value(p):
  return np.asarray(p[...], np.float64)


def project(projection, x):
  y = np.tensordot(x, value(projection.weight), projection.num_inputs)
  return y if projection.bias is None else y + value(projection.bias)


def qkv(mixer, x):
  parts = mixer.qkv.query, mixer.qkv.key, mixer.qkv.value
  return [project(part, x) for part in parts]


def rotate(x, positions, base):
  """Pairs (i, i + H/2) of channels as complex numbers."""
  half = x.shape[-1] // 2
  angle = positions[:, None, None] * base ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], -1)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize('mean_gradient', [True, False])
@pytest.mark.parametrize('gate', [True, False])
@pytest.mark.parametrize('name, rate', [('ttt_linear', 1.0), ('ttt_mlp', 0.1)])
def test_ttt(name, rate, mean_gradient, gate):
  mixer = make(name, mean_gradient=mean_gradient, gate=gate)
  x = inputs()
  q, k, v = qkv(mixer, x)
  places = np.arange(T) % C
  shares = None
  if mean_gradient:
    shares = np.maximum(1 / np.arange(1, C + 1) + value(mixer.shift), 0)
  weights = tuple(
    (value(w), value(b))
    for w, b in zip(mixer.model.weights, mixer.model.biases, strict=True)
  )
  o, _ = oracle.fast_weights(
    rotate(q, places, 10_000.0),
    rotate(k, places, 10_000.0),
    v,
    rate * sigmoid(project(mixer.rate, x)) / (D // N),
    weights=weights,
    norm=(value(mixer.model.scale), value(mixer.model.shift)),
    shares=shares,
    chunk_size=C,
  )
  o = o - o.mean((-2, -1), keepdims=True)
  o = o / np.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6)
  o = o * value(mixer.norm.scale) + value(mixer.norm.bias)
  if gate:
    o = o * oracle.gelu(project(mixer.gate, x))
  expected = project(mixer.out, o)
  np.testing.assert_allclose(run(mixer, x), expected, atol=TOLERANCE)


def test_ttt_starts_from_the_mean():
  mixer = built('ttt_mlp', d_model=D, num_heads=N, chunk_size=C)
  np.testing.assert_array_equal(mixer.shift[...], 0)
  np.testing.assert_allclose(mixer._shares(), [1, 1 / 2, 1 / 3, 1 / 4])
  assert mixer.gate is None
  # Learned below zero, a share is zero.
  mixer.shift[...] = jnp.full(C, -0.3)
  np.testing.assert_allclose(mixer._shares()[2:], [1 / 3 - 0.3, 0], atol=1e-7)
