import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax.attention_blockwise import attention_blockwise
from efficient_attn.ops.softmax.attention_reference import attention_reference
from tests.ops.attention_blockwise_test import equations
from tests.ops.attention_cases import make_arrays


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
    't5': scores.T5(array(8, 2), True, 6),
    't5_causal': scores.T5(array(6, 2), False, 7, jnp.array([4, 2])),
    'diagonal': scores.Diagonal(array(7, 2), jnp.int32(1)),
    'soft_span': scores.SoftSpan(jnp.array([0.7, 3.2]), 2.0),
    'except': scores.Except(
      scores.Alibi(array(2), jnp.int32(1)),
      jnp.arange(18).reshape(2, 9) % 4 == 0,
      jnp.int32(1),
    ),
    'swin': scores.Swin(array(25, 2), (3, 3)),
    'forget': scores.Forget(eighths(2, 9, 2)),
    'forget_offset': scores.Forget(eighths(2, 9, 2), jnp.int32(3)),
  }


NAMES = sorted(expressions())


@functools.cache
def evaluated():
  """By name: dense, a tile, the gradient of dense, and that of its tiles."""
  weights = np.random.default_rng(1).standard_normal((2, 2, 6, 9))
  weights = jnp.asarray(weights, jnp.float32)

  def evaluate(score):
    expected = jax.grad(
      lambda score: jnp.sum(weights * score.dense(6, 9)), allow_int=True
    )(score)
    total = jax.tree.map(jnp.zeros_like, score)
    for i in range(0, 6, 3):
      for j in range(0, 9, 3):
        rows, cols = jnp.arange(i, i + 3), jnp.arange(j, j + 3)
        tile = weights[:, :, i : i + 3, j : j + 3]
        total = score.accumulate(total, rows, cols, tile)
    tile = score.tile(jnp.arange(2, 5), jnp.arange(4, 9))
    return score.dense(6, 9), tile, expected, total

  def everything(expressions):
    return {name: evaluate(score) for name, score in expressions.items()}

  return jax.jit(everything)(expressions())


@pytest.mark.parametrize('name', NAMES)
def test_tile_is_the_slice_of_dense(name):
  dense, tile, _, _ = evaluated()[name]
  np.testing.assert_array_equal(tile, dense[:, :, 2:5, 4:9])


@pytest.mark.parametrize('name', NAMES)
def test_accumulated_gradient_is_that_of_dense(name):
  _, _, expected, total = evaluated()[name]
  assert jax.tree.structure(total) == jax.tree.structure(expressions()[name])
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


def t5_bucket(distance, bidirectional, buckets, most):
  """Which row of the table, as in the authors' code, for key - query."""
  first = 0
  if bidirectional:
    buckets //= 2
    first = buckets * (distance > 0)
    away = abs(distance)
  else:
    away = max(-distance, 0)
  exact = buckets // 2
  if away < exact:
    return first + away
  share = math.log(away / exact) / math.log(most / exact)
  wide = exact + int(share * (buckets - exact) + 1e-9)
  return first + min(wide, buckets - 1)


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('buckets, most', [(32, 128), (8, 20), (64, 1000)])
def test_t5_buckets(bidirectional, buckets, most):
  distances = np.r_[-1100:1100]
  # With rows that hold their own number.
  table = jnp.arange(float(buckets))[:, None]
  score = scores.T5(table, bidirectional, most)
  found = score.by_distance(jnp.asarray(distances)[None])[0, 0]
  expected = [t5_bucket(d, bidirectional, buckets, most) for d in distances]
  np.testing.assert_array_equal(found, expected)
  # The first of those after the query would be for the query itself.
  unused = {buckets // 2} if bidirectional else set()
  assert set(expected) == set(range(buckets)) - unused


def test_swin_counts_the_offsets_of_a_window():
  height, width = 2, 3
  table = jnp.arange(float(3 * 5 * 2)).reshape(15, 2)
  dense = scores.Swin(table, (height, width)).dense(6, 6)
  for q, k in np.ndindex(6, 6):
    down, right = q // width - k // width, q % width - k % width
    row = (down + height - 1) * (2 * width - 1) + right + width - 1
    np.testing.assert_array_equal(dense[0, :, q, k], table[row])
  with pytest.raises(ValueError, match='a table of 15 rows'):
    scores.Swin(table[:14], (height, width)).dense(6, 6)
  with pytest.raises(ValueError, match='at most 6'):
    scores.Swin(table, (height, width)).dense(6, 7)


def test_soft_span_is_a_ramp():
  span, ramp = np.array([0.0, 2.5, 3.0], np.float32), 4.0
  dense = np.exp(scores.SoftSpan(jnp.asarray(span), ramp).dense(12, 12))
  distance = abs(np.arange(12)[:, None] - np.arange(12))
  share = (ramp + span[:, None, None] - distance) / ramp
  np.testing.assert_allclose(dense[0], share.clip(0, 1), atol=1e-6)


def test_decoding_sees_the_rows_of_the_whole():
  found = {
    name: score
    for name, score in expressions().items()
    if isinstance(score, scores.Relative)
  }
  offset = jnp.array([6, 2])

  @jax.jit
  def both(found):
    return {
      name: (
        dataclasses.replace(score, offset=0).dense(9, 9),
        dataclasses.replace(score, offset=offset).dense(3, 9),
      )
      for name, score in found.items()
    }

  for name, (whole, step) in both(found).items():
    for b, start in enumerate(offset):
      expected = whole[0, :, start : start + 3]
      np.testing.assert_array_equal(step[b], expected, name)


LEARNED = ('t5', 't5_causal', 'diagonal', 'soft_span', 'swin', 'except')


def test_gradients_of_tables():
  """Blockwise against the dense reference and differences of the latter."""
  with jax.enable_x64(True):
    q, k, v = make_arrays(9, 9, N=2, dtype=np.float64)
    weights = np.random.default_rng(1).standard_normal((2, 9, 2, 3))
    biases = {
      name: jax.tree.map(
        lambda x: x.astype(float) if x.dtype == jnp.float32 else x,
        expressions()[name],
      )
      for name in LEARNED
    }
    tiled = functools.partial(attention_blockwise, block_q=4, block_k=3)

    def gradients(op):
      def loss(bias):
        return jnp.sum(weights * op(q, k, v, bias=bias)[0])

      def all_of_them(biases):
        return {
          name: jax.value_and_grad(loss, allow_int=True)(bias)
          for name, bias in biases.items()
        }

      return jax.jit(all_of_them)

    reference = gradients(attention_reference)
    found, expected = gradients(tiled)(biases), reference(biases)
    step = 1e-6

    def moved(x, sign):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
      return x + sign * step * np.random.default_rng(x.size).standard_normal(
        x.shape
      )

    ends = [
      reference(jax.tree.map(functools.partial(moved, sign=s), biases))
      for s in (1, -1)
    ]
    for name in LEARNED:
      total = 0
      for x, y, z in zip(
        *map(jax.tree.leaves, (found[name][1], expected[name][1])),
        jax.tree.leaves(biases[name]),
        strict=True,
      ):
        if x.dtype != jax.dtypes.float0:
          np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)
          total += np.sum(y * (moved(z, 1) - z)) / step
      difference = (ends[0][name][0] - ends[1][name][0]) / (2 * step)
      np.testing.assert_allclose(total, difference, rtol=1e-6, err_msg=name)


def test_learned_biases_are_never_a_matrix():
  T = 4096
  x = jax.ShapeDtypeStruct((2, T, 2, 8), jnp.float32)
  for name in ('t5', 't5_causal', 'diagonal', 'soft_span'):
    bias = expressions()[name]

    def loss(bias, *x):
      return jnp.sum(attention_blockwise(*x, bias=bias)[0])

    grad = jax.grad(loss, argnums=(0, 1), allow_int=True)
    program = jax.make_jaxpr(grad)(bias, x, x, x)
    largest = max(
      out.aval.size for e in equations(program.jaxpr) for out in e.outvars
    )
    assert largest < T * T / 8
