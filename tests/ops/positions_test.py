import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from efficient_attn.ops import positions


def rotary_oracle(x, steps, base, rotated):
  """Complex rotation of the pairs (i, i + rotated / 2), one at a time."""
  out = np.array(x, np.float64)
  half = rotated // 2
  for b, t, n in np.ndindex(x.shape[:3]):
    for i in range(half):
      angle = steps[b, t] * base ** (-2 * i / rotated)
      pair = complex(x[b, t, n, i], x[b, t, n, i + half])
      pair *= np.exp(1j * angle)
      out[b, t, n, i], out[b, t, n, i + half] = pair.real, pair.imag
  return out


def arrays(seed=0, shape=(2, 5, 3, 8)):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('fraction, rotated', [(1.0, 8), (0.5, 4), (0.25, 2)])
@pytest.mark.parametrize('base', [10.0, 10000.0])
def test_rotary_is_a_rotation_of_pairs(fraction, rotated, base):
  x = arrays()
  steps = np.array([[0, 1, 2, 3, 4], [7, 3, 100, 0, 1]], np.int32)
  found = positions.rotary(
    jnp.asarray(x), jnp.asarray(steps), base=base, fraction=fraction
  )
  expected = rotary_oracle(x, steps, base, rotated)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_rotary_products_depend_on_the_difference_only():
  q, k = (jnp.asarray(arrays(seed, (1, 6, 1, 16))) for seed in (1, 2))
  q, k = (jnp.broadcast_to(x[:, :1], x.shape) for x in (q, k))
  steps = jnp.arange(6)
  q = positions.rotary(q, steps + 3)
  k = positions.rotary(k, steps)
  products = jnp.einsum('btnh,btnh->t', q, k)
  np.testing.assert_allclose(products, products[0], rtol=1e-4)


def test_rotary_shared_positions_and_dtype():
  x = jnp.asarray(arrays(), jnp.bfloat16)
  steps = jnp.arange(5)
  shared = positions.rotary(x, steps)
  assert shared.dtype == jnp.bfloat16
  each = positions.rotary(x, jnp.broadcast_to(steps, (2, 5)))
  np.testing.assert_array_equal(shared, each)


def test_rotary_is_exact_far_out_in_bfloat16():
  x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
  found = positions.rotary(x, jnp.array([1001]))
  expected = np.cos(1001.0) - np.sin(1001.0)
  np.testing.assert_allclose(float(found[0, 0, 0, 0]), expected, rtol=0.01)


def test_sinusoidal_follows_the_formula():
  found = positions.sinusoidal(jnp.arange(5), 6, max_period=100.0)
  for p, i in np.ndindex(5, 3):
    angle = p * 100.0 ** (-2 * i / 6)
    np.testing.assert_allclose(found[p, i], np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(found[p, 3 + i], np.cos(angle), atol=1e-6)
  batched = positions.sinusoidal(jnp.arange(5)[None], 6, max_period=100.0)
  np.testing.assert_array_equal(batched[0], found)


def test_sincos_2d_follows_the_formula():
  height, width, dim = 2, 3, 12
  found = positions.sincos_2d(height, width, dim)
  assert found.shape == (height * width, dim)
  frequencies = [1.0, 1e-2, 1e-4]
  for y, x, i in np.ndindex(height, width, 3):
    row = found[y * width + x]
    expected = [f(p * frequencies[i]) for p in (x, y) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(row[i::3], expected, atol=1e-6)


@pytest.fixture
def unchecked():
  """Our own errors, not those of the annotations that tests check."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


@pytest.mark.parametrize(
  'call, message',
  [
    (
      lambda x: positions.rotary(x, jnp.arange(5), fraction=0.4),
      'rotates 3 channels',
    ),
    (lambda x: positions.rotary(x, jnp.arange(5), fraction=2.0), r'\(0, 1\]'),
    (lambda x: positions.rotary(x, jnp.arange(4)), 'positions of shape'),
    (lambda x: positions.sinusoidal(jnp.arange(5), 5), 'dim is 5'),
    (lambda x: positions.sincos_2d(2, 2, 10), 'dim is 10'),
    (lambda x: positions.sincos_2d(2, 2, 4), 'at least 8'),
  ],
)
def test_errors_name_the_argument(unchecked, call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.asarray(arrays()))
