"""short_conv against plain loops, with states, segments and gradients."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.short_conv import short_conv
from tests.optimized import optimized
from tests.oracles import linear_attention as oracle

TAPS, WIDTH = 4, 3


def make(length, *, state=True, segments=True, taps=TAPS, dtype=np.float64):
  rng = np.random.default_rng(0)
  arrays = {
    'x': rng.standard_normal((2, length, WIDTH)).astype(dtype),
    'weight': rng.standard_normal((taps, WIDTH)).astype(dtype),
    'bias': rng.standard_normal(WIDTH).astype(dtype),
  }
  if state:
    past = rng.standard_normal((2, taps - 1, WIDTH))
    arrays['initial_state'] = past.astype(dtype)
  ids = None
  if segments:
    ids = np.cumsum(rng.random((2, length)) < 0.25, axis=1) % 3
    ids = ids.astype(np.int32)
  return arrays, ids


@jax.jit
def vjp(arrays, cotangents, ids=None):
  result, pull = jax.vjp(lambda a: short_conv(**a, segment_ids=ids), arrays)
  return *result, pull(cotangents)[0]


@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('segments', [False, True])
@pytest.mark.parametrize('length', [1, 2, 3, 4, 13])
def test_matches_the_loops_with_gradients(length, segments, state):
  arrays, ids = make(length, state=state, segments=segments)
  expected = oracle.short_conv(**arrays, segment_ids=ids)
  rng = np.random.default_rng(1)
  cotangents = tuple(rng.standard_normal(x.shape) for x in expected)
  with jax.enable_x64(True):
    to_jax = lambda tree: jax.tree.map(jnp.asarray, tree)  # noqa: E731
    y, final, grads = vjp(to_jax(arrays), to_jax(cotangents), ids)
    np.testing.assert_allclose(y, expected[0], atol=1e-13)
    np.testing.assert_allclose(final, expected[1], atol=0)
    grads = jax.tree.map(np.asarray, grads)
  direction = {n: rng.standard_normal(x.shape) for n, x in arrays.items()}

  def loss(step):
    moved = {n: x + step * direction[n] for n, x in arrays.items()}
    results = oracle.short_conv(**moved, segment_ids=ids)
    return sum(np.vdot(x, c) for x, c in zip(results, cotangents, strict=True))

  slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
  paired = sum(np.vdot(grads[n], direction[n]) for n in arrays)
  np.testing.assert_allclose(paired, slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize('segments', [False, True])
def test_split_equals_whole_at_every_cut(segments):
  arrays, ids = make(9, segments=segments)
  arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
  call = jax.jit(short_conv)
  whole, final = call(**arrays, segment_ids=ids)
  x = arrays.pop('x')
  past = arrays.pop('initial_state')
  for cut in range(1, 9):
    parts = [None, None] if ids is None else [ids[:, :cut], ids[:, cut:]]
    first, state = call(
      x[:, :cut], **arrays, initial_state=past, segment_ids=parts[0]
    )
    if ids is not None:
      fresh = ids[:, cut] != ids[:, cut - 1]
      state = jnp.where(fresh[:, None, None], 0, state)
    second, state = call(
      x[:, cut:], **arrays, initial_state=state, segment_ids=parts[1]
    )
    joined = jnp.concatenate([first, second], 1)
    np.testing.assert_allclose(joined, whole, atol=1e-6)
    np.testing.assert_array_equal(state, final)


def test_causality_is_bitwise():
  arrays, ids = make(13, dtype=np.float32)
  arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
  call = optimized(short_conv)
  y, _ = call(**arrays, segment_ids=ids)
  for cut in range(1, 13):
    x = arrays['x'].at[:, cut:].add(1)
    moved, _ = call(**{**arrays, 'x': x}, segment_ids=ids)
    np.testing.assert_array_equal(moved[:, :cut], y[:, :cut], f'cut at {cut}')
    assert np.all(moved[:, cut] != y[:, cut]), cut


def test_one_tap_is_a_product_and_has_an_empty_state():
  arrays, _ = make(5, taps=1, state=False, segments=False, dtype=np.float32)
  x, weight = jnp.asarray(arrays['x']), jnp.asarray(arrays['weight'])
  y, state = short_conv(x, weight)
  np.testing.assert_allclose(y, x * weight[0], rtol=1e-6)
  assert state.shape == (2, 0, WIDTH)


def test_bfloat16_sums_in_float32():
  arrays, _ = make(64, state=False, segments=False)
  low = {n: jnp.asarray(x, jnp.bfloat16) for n, x in arrays.items()}
  y, state = short_conv(**low)
  exact = {n: np.asarray(x, np.float64) for n, x in low.items()}
  expected, _ = oracle.short_conv(**exact)
  assert y.dtype == state.dtype == jnp.bfloat16
  # Only the rounding of the result is left.
  rounded = np.asarray(y, np.float64)
  np.testing.assert_allclose(rounded, expected, rtol=2**-8, atol=1e-6)


ERRORS = {
  'x has shape': {'x': jnp.zeros((5, WIDTH))},
  'length >= 1': {'x': jnp.zeros((2, 0, WIDTH))},
  'weight has shape': {'weight': jnp.zeros((WIDTH, TAPS))},
  'bias has shape': {'bias': jnp.zeros(2)},
  'initial_state has shape': {'initial_state': jnp.zeros((2, TAPS, WIDTH))},
  'segment_ids has shape': {'segment_ids': jnp.zeros((2, 4), int)},
}


@pytest.mark.parametrize('message', ERRORS)
def test_wrong_calls_say_what_is_wrong(message):
  arrays, _ = make(5, dtype=np.float32)
  with pytest.raises(ValueError, match=message):
    inspect.unwrap(short_conv)(**{**arrays, **ERRORS[message]})
