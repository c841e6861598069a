"""Feature maps against the kernels they stand for."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent import feature_maps
from tests.optimized import optimized
from tests.oracles import feature_maps as oracle


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def kernel(phi, q, k):
  """phi(q_t) . phi(k_s) in float64, [B, N, T, S]."""
  with jax.enable_x64(True):
    q, k = (np.asarray(phi(jnp.asarray(x))) for x in (q, k))
  return oracle.dot(q, k)


def projections(count, features, channels):
  """`count` independent orthogonal projections [count, m, H]."""
  keys = jax.random.split(jax.random.key(0), count)
  draw = functools.partial(
    feature_maps.orthogonal_projection, features=features, channels=channels
  )
  return np.asarray(jax.jit(jax.vmap(draw))(keys))


@pytest.mark.parametrize('channels', [1, 2, 3, 8, 9])
def test_polynomials_are_exact(channels):
  q, k = normal(2, 2, 5, 3, channels)
  triangle = channels * (channels + 1) // 2
  for phi, expected, width in (
    (feature_maps.quadratic, oracle.dot(q, k) ** 2, triangle),
    (feature_maps.taylor, oracle.taylor(q, k), 1 + channels + triangle),
  ):
    assert phi(jnp.asarray(q, jnp.float32)).shape[-1] == width
    np.testing.assert_allclose(kernel(phi, q, k), expected, atol=1e-12)


def test_gradient_of_a_polynomial_kernel():
  x, y = normal(2, 6)
  with jax.enable_x64(True):
    phi = feature_maps.taylor
    grad = jax.grad(lambda x: phi(x) @ phi(jnp.asarray(y)))(jnp.asarray(x))
  np.testing.assert_allclose(grad, (1 + x @ y) * y, atol=1e-12)


def test_diagonal_taylor_is_its_polynomial():
  q, k = normal(2, 2, 5, 3, 4)
  scalars = 0.7, 1.3, 0.4
  phi = lambda x: feature_maps.taylor_diagonal(x, *map(jnp.asarray, scalars))  # noqa: E731
  expected = oracle.taylor_diagonal(q, k, *scalars)
  np.testing.assert_allclose(kernel(phi, q, k), expected, atol=1e-12)
  assert oracle.taylor_diagonal(10 * q, k, 1, 1, 1).min() >= 0
  # Full and compact differ in the products of two different channels only.
  q, k = q[..., :1], k[..., :1]
  compact = oracle.taylor_diagonal(q, k, 1, 1, 2**0.5)
  np.testing.assert_allclose(compact, 2 * oracle.taylor(q, k))


@pytest.mark.parametrize('batched', [False, True])
def test_cosine_is_the_reweighted_relu(batched):
  q, k = normal(2, 2, 7, 3, 4)
  positions = jnp.arange(7) + 1000
  if batched:
    positions = jnp.stack([positions, positions + 5])
  phi = functools.partial(
    feature_maps.cosine, positions=positions, max_length=8
  )
  expected = oracle.cosine(q, k, 8)
  np.testing.assert_allclose(kernel(phi, q, k), expected, atol=1e-12)
  assert expected.min() == 0 and expected.max() > 0.1


def test_cosine_has_its_zero_at_the_longest_distance():
  one = np.ones((1, 10, 1, 1))
  phi = functools.partial(
    feature_maps.cosine, positions=jnp.arange(10), max_length=8
  )
  row = kernel(phi, one, one)[0, 0, :, 0]
  np.testing.assert_allclose(row, np.cos(np.pi / 16 * np.arange(10)))
  np.testing.assert_array_less(0, row[:8])
  assert abs(row[8]) < 1e-15
  assert row[9] < 0


def test_softmax_pair():
  x = normal(2, 5, 3, 4)
  with jax.enable_x64(True):
    phi = np.asarray(feature_maps.softmax_pair(jnp.asarray(x)))
  np.testing.assert_allclose(phi, oracle.hedgehog(x), atol=1e-14)
  np.testing.assert_allclose(phi.sum(-1), 1)
  extreme = feature_maps.softmax_pair(jnp.array([1e4, -3.0]))
  np.testing.assert_array_equal(extreme, [1, 0, 0, 0])


def test_elu_plus_one_keeps_small_features():
  x = np.concatenate([normal(50), [-80.0, -20.0, 0.0, 20.0]])
  y = feature_maps.elu_plus_one(jnp.asarray(x, jnp.float32))
  x = np.asarray(x, np.float32).astype(np.float64)
  expected = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  np.testing.assert_allclose(y, expected, rtol=2e-6)


def test_unit_vectors():
  x = jnp.asarray(normal(4, 3), jnp.float32).at[0].set(0)
  y = feature_maps.unit(x)
  np.testing.assert_allclose(jnp.sum(y * y, -1), [0, 1, 1, 1], rtol=1e-6)
  grad = jax.jacobian(feature_maps.unit)(x)
  chex.assert_tree_all_finite(grad)


def test_projection_is_orthogonal_in_blocks_and_normal():
  w = projections(2000, 11, 4)
  assert w.shape == (2000, 11, 4)
  products = np.einsum('nih,njh->nij', w, w)
  block = np.arange(11) // 4
  same = (block[:, None] == block) & ~np.eye(11, dtype=bool)
  assert np.abs(products[:, same]).max() < 1e-4
  assert np.abs(products[:, block[:, None] != block]).max() > 1
  # Moments of N(0, I): 0, 1, 0 and 3, for each entry within 5 deviations.
  for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
    error = np.abs((w**power).mean(0) - moment).max()
    assert error < 5 * (variance / len(w)) ** 0.5, power


X, Y = np.array([[0.3, -0.2, 0.1, 0.2], [0.1, -0.3, 0.2, 0.1]])


def errors(w, *, hyperbolic=False):
  """Relative errors of the estimates of exp(X . Y), one per projection."""
  phi = functools.partial(feature_maps.positive_random, hyperbolic=hyperbolic)

  @optimized
  @jax.vmap
  def estimate(w):
    return phi(jnp.float32(X), w) @ phi(jnp.float32(Y), w)

  return np.asarray(estimate(jnp.asarray(w, jnp.float32))) / np.exp(X @ Y) - 1


@pytest.mark.parametrize('hyperbolic', [False, True])
def test_positive_random_features_are_unbiased(hyperbolic):
  e = errors(projections(4000, 16, 4), hyperbolic=hyperbolic)
  assert abs(e.mean()) < 4 * e.std() / len(e) ** 0.5
  # The variance of 16 independent features, lemma 2 of the paper.
  variance = np.expm1(np.sum((X + Y) ** 2)) / 16
  assert e.var() < 1.1 * variance


def test_error_falls_with_the_root_of_the_features():
  rms = [errors(projections(800, m, 4)).std() for m in (8, 128)]
  assert rms[0] / rms[1] == pytest.approx(4, rel=0.15)


def test_orthogonal_and_hyperbolic_features_have_less_variance():
  w = projections(2000, 16, 4)
  independent = normal(2000, 16, 4)
  plain, hyperbolic = errors(w), errors(w[:, :8], hyperbolic=True)  # f = 16
  assert hyperbolic.std() < 0.9 * plain.std()
  # Orthogonal rows know more of the square of w . x, not of w . x itself.
  other = errors(independent[:, :8], hyperbolic=True)
  assert hyperbolic.std() < 0.9 * other.std()


def test_the_survey_misprints_the_features():
  x, y = np.array([[0.7, -0.5, 0.3], [0.2, -0.9, 0.4]])
  w = normal(200_000, 3)

  def estimate(printed):
    terms = len(w) * (
      oracle.positive_random(x, w, printed)
      * oracle.positive_random(y, w, printed)
    )
    return terms.mean(), terms.std() / len(w) ** 0.5

  mean, deviation = estimate(printed=False)
  assert abs(mean - np.exp(x @ y)) < 4 * deviation
  mean, deviation = estimate(printed=True)
  assert abs(mean - np.exp(x @ y)) > 20 * deviation
  with jax.enable_x64(True):
    ours = feature_maps.positive_random(jnp.asarray(x), jnp.asarray(w))
  np.testing.assert_allclose(ours, oracle.positive_random(x, w), rtol=1e-12)


def test_positive_random_features_stay_in_range():
  w = jnp.asarray(projections(1, 266, 64)[0])
  # Small, ordinary and huge vectors, and those that meet a row exactly.
  x = np.concatenate([normal(50, 64) * s for s in (0.1, 1, 30)] + [w])
  x = jnp.asarray(x, jnp.float32)
  keys = np.asarray(feature_maps.positive_random(x, w), np.float64)
  bound = np.exp(np.sum(np.float64(w) ** 2, -1) / 2) / len(w) ** 0.5
  chex.assert_tree_all_finite(keys)
  np.testing.assert_array_less(keys, np.tile(bound * 1.001, (len(keys), 1)))
  queries = feature_maps.positive_random(x, w, shift=True)
  np.testing.assert_allclose(queries.max(-1), len(w) ** -0.5, rtol=1e-6)
  small = slice(0, 100)  # where no key underflows: one factor per vector
  ratio = keys[small] / np.asarray(queries[small], np.float64)
  ratio = ratio[:, :1] / ratio
  np.testing.assert_allclose(ratio, 1, rtol=1e-4)


def test_fourier_features_estimate_the_gaussian_kernel():
  x, y = feature_maps.unit(jnp.asarray(normal(2, 1, 1, 1, 6), jnp.float32))
  rms = []
  for features in (64, 1024):
    w = jnp.asarray(normal(500, features, 6), jnp.float32)
    tile = lambda a: jnp.tile(a, (1, 1, 500, 1))  # noqa: E731
    phi_x = feature_maps.fourier(tile(x), w)
    phi_y = feature_maps.fourier(tile(y), w)
    np.testing.assert_allclose(jnp.sum(phi_x**2, -1), 1, rtol=1e-5)
    kernel = np.asarray(jnp.sum(phi_x * phi_y, -1))
    error = kernel - np.exp(-np.sum((x - y) ** 2) / 2)
    assert abs(error.mean()) < 4 * error.std() / 500**0.5
    rms.append(error.std())
  assert rms[0] / rms[1] == pytest.approx(4, rel=0.15)


MAPS = {
  **feature_maps.FEATURE_MAPS,
  'unit': feature_maps.unit,
  'quadratic': feature_maps.quadratic,
  'taylor': feature_maps.taylor,
  'softmax_pair': feature_maps.softmax_pair,
  'positive_random': functools.partial(
    feature_maps.positive_random, projection=jnp.float32(normal(6, 4))
  ),
  'fourier': functools.partial(
    feature_maps.fourier, projection=jnp.float32(normal(3, 6, 4))
  ),
  'cosine': functools.partial(
    feature_maps.cosine, positions=jnp.arange(300, 307), max_length=512
  ),
}


@pytest.mark.parametrize('name', sorted(MAPS))
def test_bfloat16_in_bfloat16_out(name):
  x = jnp.asarray(normal(2, 7, 3, 4), jnp.bfloat16)
  y = MAPS[name](x)
  assert y.dtype == jnp.bfloat16
  exact = np.asarray(MAPS[name](x.astype(jnp.float32)))
  error = np.abs(np.asarray(y, np.float32) - exact)
  assert error.max() < 2**-6 * np.abs(exact).max()
