"""Activations of the feed-forward layers."""

import numpy as np
import scipy.special

from efficient_attn.layers.ffn import ACTIVATIONS

X = np.linspace(-4, 4, 33, dtype=np.float32)


def by_tanh(x):
  return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_gelu_is_exact_and_gelu_tanh_its_approximation():
  exact = X / 2 * (1 + scipy.special.erf(X / 2**0.5))
  np.testing.assert_allclose(ACTIVATIONS['gelu'](X), exact, atol=1e-6)
  np.testing.assert_allclose(ACTIVATIONS['gelu_tanh'](X), by_tanh(X), atol=1e-6)
  assert np.abs(exact - by_tanh(X)).max() > 1e-4
