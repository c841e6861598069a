"""Nystrom attention: the equations, the inverse, and where it is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.low_rank.banded_conv import banded_conv
from efficient_attn.ops.low_rank.nystrom import (
  iterative_pinv,
  nystrom_attention,
)
from efficient_attn.ops.pooling import mean_pool, repeat
from tests.ops.low_rank_cases import check, normal, place, unchecked
from tests.optimized import optimized
from tests.oracles import low_rank as oracle

B, N, H, V = 2, 2, 3, 4


def arrays(T, seed=0):
  return normal(seed, query=(B, T, N, H), key=(B, T, N, H), value=(B, T, N, V))


# Landmarks that divide the length, that do not, one, and one for each token.
CASES = ((12, 4, 6), (13, 4, 6), (13, 4, None), (5, 1, 6), (3, 8, None))


@pytest.mark.parametrize('T, num_landmarks, iterations', CASES)
def test_equations_and_gradients(T, num_landmarks, iterations):
  options = dict(num_landmarks=num_landmarks, iterations=iterations)
  check(
    functools.partial(nystrom_attention, **options),
    functools.partial(oracle.nystrom, **options),
    arrays(T),
    tolerance=1e-9,
    slope=1e-5,
  )


def exact(query, key, value):
  logits = oracle.dot(query, key) / np.sqrt(query.shape[-1])
  return oracle.from_logits(logits, value)


@pytest.mark.parametrize('iterations', [None, 40])
def test_all_landmarks_are_softmax_attention(iterations):
  data = arrays(9)
  if (
    iterations is not None
  ):  # sharp weights: a matrix that is far from singular
    data['query'] = data['key'] = 3 * data['key']
  with jax.enable_x64(True):
    call = functools.partial(nystrom_attention, iterations=iterations)
    out, few = (
      np.asarray(jax.jit(functools.partial(call, num_landmarks=m))(**data))
      for m in (9, 3)
    )
  np.testing.assert_allclose(out, exact(**data), rtol=0, atol=1e-8)
  # Fewer landmarks are an approximation, and a poor one of random data.
  assert np.abs(few - exact(**data)).max() > 0.1


def test_iterations_approach_the_inverse():
  a = oracle.softmax(2 * normal(3, a=(2, 3, 8, 8))['a'])

  @functools.partial(jax.jit, static_argnums=1)
  def residual(a, iterations):
    return jnp.abs(a @ iterative_pinv(a, iterations) @ a - a).max()

  with jax.enable_x64(True):
    errors = [float(residual(a, i)) for i in (0, 3, 6, 12, 30)]
  assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
  assert errors[0] > 1e-2 and errors[-1] < 1e-12


def test_bfloat16_is_as_good_as_its_inputs():
  data = {k: x.astype(jnp.bfloat16) for k, x in arrays(24).items()}
  call = optimized(functools.partial(nystrom_attention, num_landmarks=8))
  out = call(**data)
  assert out.dtype == jnp.bfloat16
  wide = {k: np.asarray(x, np.float64) for k, x in data.items()}
  expected = oracle.nystrom(**wide, num_landmarks=8, iterations=6)
  assert np.abs(out - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize('T, size', [(6, 3), (7, 3), (1, 4), (5, 1)])
def test_pools(T, size):
  x = normal(1, x=(2, T, 2, 3))['x'].astype(np.float32)
  pooled = mean_pool(jnp.asarray(x), size)
  expected = np.stack([oracle.means(row, size) for row in x])
  np.testing.assert_allclose(pooled, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(
    repeat(pooled, size, T), np.repeat(pooled, size, axis=1)[:, :T]
  )


@pytest.mark.parametrize('T, W', [(1, 3), (7, 1), (7, 3), (8, 5), (3, 9)])
def test_residual(T, W):
  check(banded_conv, oracle.convolve, normal(6, x=(B, T, N, H), taps=(W, N)))


@unchecked()
def test_wrong_calls():
  with pytest.raises(ValueError, match='2 taps: pass an odd number'):
    banded_conv(jnp.ones((1, 3, 2, 1)), jnp.ones((2, 2)))
  data = place(arrays(4))
  with pytest.raises(ValueError, match='num_landmarks = 0'):
    nystrom_attention(**data, num_landmarks=0)
  with pytest.raises(
    ValueError, match=r'key has shape \(2, 3, 2, 3\): pass \(2, 4'
  ):
    nystrom_attention(
      data['query'], data['key'][:, :3], data['value'], num_landmarks=2
    )
  with pytest.raises(ValueError, match='size = 0'):
    mean_pool(data['key'], 0)
