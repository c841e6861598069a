import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax import normalizers
from efficient_attn.ops.softmax.attention_reference import attention_reference
from tests.ops.attention_cases import make_arrays

ALPHAS = (1.0, 1.001, 1.2, 1.5, 1.9, 2.0)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def solve(z, alpha):
  """alpha-entmax of one row, by a root finder of its own."""
  seen = z > -np.inf
  p = np.zeros_like(z)
  if not seen.any():
    return p
  if alpha == 1:
    p[seen] = np.exp(z[seen] - z[seen].max())
    return p / p.sum()
  y = (alpha - 1) * z[seen]

  def weights(tau):
    return np.maximum(y - tau, 0) ** (1 / (alpha - 1))

  def excess(tau):
    return weights(tau).sum() - 1

  high = y.max()
  tau = scipy.optimize.brentq(excess, high - 1, high, xtol=1e-15, rtol=1e-14)
  p[seen] = weights(tau)
  return p


def rows():
  rng = np.random.default_rng(0)
  z = 2 * rng.standard_normal((3, 9))
  z[1, 4:] = -np.inf
  z[2] = -np.inf
  return np.tile(z, (len(ALPHAS), 1, 1))


def test_entmax_against_a_root_finder(x64):
  z, alpha = rows(), np.array(ALPHAS)[:, None]
  found = normalizers.entmax(jnp.asarray(z), jnp.asarray(alpha))
  for a, r in np.ndindex(len(ALPHAS), 3):
    # The power 1 / (alpha - 1) is 1000 at 1.001.
    expected = solve(z[a, r], ALPHAS[a])
    tolerance = 1e-11 if ALPHAS[a] == 1.001 else 1e-13
    np.testing.assert_allclose(found[a, r], expected, atol=tolerance)
  # The larger alpha, the fewer weights.
  counts = (np.asarray(found[:, 0]) > 0).sum(-1)
  assert counts[0] == 9 and (np.diff(counts) <= 0).all() and counts[-1] < 5
  single = normalizers.entmax(
    jnp.asarray(z, jnp.float32), jnp.asarray(alpha, jnp.float32)
  )
  assert single.dtype == jnp.float32
  np.testing.assert_allclose(single[2:], found[2:], atol=1e-6)


def test_gradients_of_entmax(x64):
  z, weights = rows()[:, :2], np.random.default_rng(1).standard_normal((2, 9))
  alpha = np.array(ALPHAS)[:, None]

  def f(z, alpha):
    return jnp.sum(jnp.asarray(weights) * normalizers.entmax(z, alpha))

  dz, dalpha = jax.jit(jax.grad(f, argnums=(0, 1)))(
    jnp.asarray(z), jnp.asarray(alpha)
  )
  chex.assert_tree_all_finite(dz)
  step = 1e-6
  for a in range(len(ALPHAS)):

    def g(shift, more, a=a):
      return sum(
        weights[r] @ solve(z[a, r] + shift[r], ALPHAS[a] + more)
        for r in range(2)
      )

    shift = step * np.random.default_rng(2).standard_normal((2, 9))
    expected = (g(shift, 0) - g(-shift, 0)) / 2
    np.testing.assert_allclose(
      np.sum(np.asarray(dz[a]) * shift), expected, rtol=1e-5, atol=1e-13
    )
    if ALPHAS[a] == 1:  # from one side, with a larger step: 1 / (alpha - 1)
      h = 2e-4
      expected = (4 * g(0 * shift, h) - g(0 * shift, 2 * h)) / (2 * h)
      expected -= 3 * g(0 * shift, 0) / (2 * h)
      tolerance = 1e-3
    elif ALPHAS[a] == 1.001:
      continue
    else:
      expected = (g(0 * shift, step) - g(0 * shift, -step)) / (2 * step)
      tolerance = 1e-5
    np.testing.assert_allclose(dalpha[a, 0], expected, rtol=tolerance)


def test_hard_is_straight_through():
  z = jnp.asarray(rows()[0], jnp.float32).at[0, 5].set(9.0).at[0, 2].set(9.0)
  found = normalizers.hard(z)
  np.testing.assert_array_equal(found.sum(-1), [1, 1, 0])
  assert found[0, 2] == 1  # the first of equals
  gradient, expected = (
    jax.grad(lambda z, f=f: jnp.sum(jnp.arange(9.0) * f(z)))(z[:2])
    for f in (normalizers.hard, normalizers.softmax)
  )
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_gumbel_draws_with_the_probabilities_of_the_softmax():
  z = jnp.asarray([0.0, 1.0, -1.0, -jnp.inf])
  draw = functools.partial(normalizers.gumbel, straight_through=True)
  keys = jax.random.split(jax.random.key(0), 4000)
  found = jax.vmap(lambda key: draw(z, key))(keys)
  assert ((found == 0) | (found == 1)).all()
  expected = normalizers.softmax(z)
  deviation = np.sqrt(expected * (1 - expected) / len(keys))
  np.testing.assert_array_less(
    np.abs(found.mean(0) - expected), 4 * deviation + 1e-9
  )
  warm = normalizers.gumbel(z, keys[0], temperature=100.0)
  np.testing.assert_allclose(warm, [1 / 3] * 3 + [0], atol=0.02)


def test_attention_with_softmax_is_attention():
  q, k, v = make_arrays(7, 9)
  mask, bias = masks.Causal(-1), scores.Alibi(jnp.linspace(0, 1, 4))
  for scale in (None, 0.3):
    options = dict(mask=mask, bias=bias, scale=scale)
    found = normalizers.normalized_attention(
      q, k, v, normalize=normalizers.softmax, **options
    )
    expected, _ = attention_reference(q, k, v, **options)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[:, 0], 0)  # which sees nothing
