"""Activations and biases of the feed-forward layers."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from efficient_attn.layers.ffn import ACTIVATIONS
from efficient_attn.layers.ffns import FFNS
from tests.layers.built import filled

X = np.linspace(-4, 4, 33, dtype=np.float32)


def by_tanh(x):
  return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_gelu_is_exact_and_gelu_tanh_its_approximation():
  exact = X / 2 * (1 + scipy.special.erf(X / 2**0.5))
  np.testing.assert_allclose(ACTIVATIONS['gelu'](X), exact, atol=1e-6)
  np.testing.assert_allclose(ACTIVATIONS['gelu_tanh'](X), by_tanh(X), atol=1e-6)
  assert np.abs(exact - by_tanh(X)).max() > 1e-4


def test_activations_by_hand():
  quick = X / (1 + np.exp(-1.702 * X))
  np.testing.assert_allclose(ACTIVATIONS['quick_gelu'](X), quick, atol=1e-6)
  relu2 = np.where(X > 0, X * X, 0)
  np.testing.assert_allclose(ACTIVATIONS['relu2'](X), relu2, atol=1e-6)


def test_a_clamped_glu_by_hand():
  limit, offset = 0.5, 1.0

  def build():
    return FFNS['glu'](
      8, 12, ACTIVATIONS['silu'], limit=limit, offset=offset, rngs=nnx.Rngs(0)
    )

  ffn = filled(build)
  x = 3 * np.random.default_rng(1).standard_normal((2, 3, 8))
  gate, up, down = (
    np.asarray(p.weight[...]) for p in (ffn.gate, ffn.up, ffn.down)
  )
  gates, values = np.minimum(x @ gate, limit), np.clip(x @ up, -limit, limit)
  assert (x @ gate > limit).any() and (x @ up < -limit).any()
  wanted = (gates / (1 + np.exp(-gates)) * (values + offset)) @ down
  y = ffn(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(y, wanted, atol=1e-5)


@pytest.mark.parametrize('name', ['mlp', 'glu'])
def test_biases(name):
  def build(bias):
    rngs = nnx.Rngs(0)
    return FFNS[name](8, 12, ACTIVATIONS['gelu_tanh'], bias=bias, rngs=rngs)

  ffn = filled(lambda: build(True))
  x = np.random.default_rng(1).standard_normal((2, 3, 8))

  def project(layer, x):
    return x @ np.asarray(layer.weight[...]) + np.asarray(layer.bias[...])

  up = project(ffn.up, x)
  hidden = by_tanh(up) if name == 'mlp' else by_tanh(project(ffn.gate, x)) * up
  wanted = project(ffn.down, hidden)
  y = ffn(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(y, wanted, atol=1e-5)
  without = nnx.state(nnx.eval_shape(lambda: build(False)))
  assert {path[-1] for path, _ in nnx.to_flat_state(without)} == {'weight'}
