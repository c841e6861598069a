import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks, scores


def test_slopes_of_a_power_of_two():
  np.testing.assert_allclose(
    scores.alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-7
  )
  np.testing.assert_allclose(scores.alibi_slopes(1), [2.0**-8])


def test_slopes_of_other_counts_interleave_the_next_power():
  # The published rule: those of 8 heads, then every other one of 16.
  expected = [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5]
  np.testing.assert_allclose(scores.alibi_slopes(10), expected, rtol=1e-6)
  for heads in range(1, 40):
    assert scores.alibi_slopes(heads).shape == (heads,)


def test_no_heads_is_an_error():
  with pytest.raises(ValueError, match='num_heads is 0'):
    scores.alibi_slopes(0)


def test_alibi_follows_the_rule():
  T, S = 5, 7
  slopes = np.array([0.5, 0.1], np.float32)
  dense = scores.Alibi(jnp.asarray(slopes)).dense(T, S)
  assert dense.shape == (1, 2, T, S)
  for n, t, s in np.ndindex(2, T, S):
    np.testing.assert_allclose(dense[0, n, t, s], -slopes[n] * abs(t - s))


@pytest.mark.parametrize('offset', [6, np.array(6), np.array([6, 2])])
def test_alibi_offset_is_that_of_decoding(offset):
  slopes = jnp.asarray(scores.alibi_slopes(4))
  full = scores.Alibi(slopes).dense(9, 9)
  step = scores.Alibi(
    slopes, offset if isinstance(offset, int) else jnp.asarray(offset)
  )
  found = step.dense(1, 9)
  for b, row in enumerate(np.atleast_1d(offset)):
    np.testing.assert_array_equal(found[b, :, 0], full[0, :, row])


def test_distances_stay_exact_with_bfloat16_slopes():
  slopes = jnp.ones((1,), jnp.bfloat16)
  row = scores.Alibi(slopes).dense(1, 1001)[0, 0, 0]
  np.testing.assert_array_equal(row, -np.arange(1001))


def expressions():
  rng = np.random.default_rng(0)

  def array(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  def eighths(*shape):  # whose sums are exact in any order
    return jnp.asarray(-rng.integers(0, 9, shape) / 8, jnp.float32)

  return {
    'alibi': scores.Alibi(array(2)),
    'alibi_offset': scores.Alibi(array(2), jnp.array([1, 2])),
    'dense': scores.Dense(array(2, 2, 6, 9)),
    'dense_heads': scores.Dense(array(2, 6, 9)),
    'dense_keys': scores.Dense(array(2, 1, 1, 9)),
    'dense_rows': scores.Dense(array(6, 1)),
    'dense_scalar': scores.Dense(array()),
    'sum': scores.Alibi(array(2)) + scores.Dense(array(6, 9)),
    'forget': scores.Forget(eighths(2, 9, 2)),
    'forget_offset': scores.Forget(eighths(2, 9, 2), jnp.int32(3)),
  }


@pytest.mark.parametrize('name', list(expressions()))
def test_tile_is_the_slice_of_dense(name):
  score = expressions()[name]
  tile = score.tile(jnp.arange(2, 5), jnp.arange(4, 9))
  np.testing.assert_array_equal(tile, score.dense(6, 9)[:, :, 2:5, 4:9])


@pytest.mark.parametrize('name', list(expressions()))
def test_accumulated_gradient_is_that_of_dense(name):
  score = expressions()[name]
  weights = np.random.default_rng(1).standard_normal((2, 2, 6, 9))
  weights = jnp.asarray(weights, jnp.float32)
  expected = jax.grad(
    lambda score: jnp.sum(weights * score.dense(6, 9)), allow_int=True
  )(score)
  total = jax.tree.map(jnp.zeros_like, score)
  for i in range(0, 6, 3):
    for j in range(0, 9, 3):
      rows, cols = jnp.arange(i, i + 3), jnp.arange(j, j + 3)
      tile = weights[:, :, i : i + 3, j : j + 3]
      total = score.accumulate(total, rows, cols, tile)
  assert jax.tree.structure(total) == jax.tree.structure(score)
  for found, wanted in zip(
    jax.tree.leaves(total), jax.tree.leaves(expected), strict=True
  ):
    if wanted.dtype != jax.dtypes.float0:
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_new_score_is_one_dataclass():
  @masks.expression
  class Temperature(scores.Score):
    steps: jax.Array

    def tile(self, rows, cols):
      return jnp.broadcast_to(self.steps[rows], (1, 1, 1, rows.size)).mT + (
        0.0 * cols
      )

  score = Temperature(jnp.arange(4.0))
  assert score.dense(4, 3).shape == (1, 1, 4, 3)
  gradient = jax.grad(lambda score: score.dense(4, 3).sum())(score)
  np.testing.assert_array_equal(gradient.steps, 3.0)


@pytest.mark.parametrize(
  'shape, message',
  [
    ((4, 9), 'axis T .* is 4 but T is 6'),
    ((6, 8), 'axis S .* is 8 but S is 9'),
    ((1, 1, 1, 6, 9), 'has 5 axes'),
  ],
)
def test_errors_name_the_axis(shape, message):
  with pytest.raises(ValueError, match=message):
    scores.Dense(jnp.zeros(shape)).dense(6, 9)
