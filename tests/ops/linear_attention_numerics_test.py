"""Rounding of linear_attention: float32, bfloat16, hard gates, empty sums."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent import gates
from efficient_attn.ops.recurrent.forms import FORMS
from tests.ops.linear_attention_cases import (
  CHANNELS,
  CHUNK,
  GATES,
  LENGTH,
  apply,
  assert_close,
  cotangents_of,
  make,
  reference,
  to_jax,
  vjp,
)
from tests.optimized import optimized
from tests.oracles import linear_attention as oracle


@pytest.mark.parametrize('gate', GATES)
def test_float32_error_is_within_twice_that_of_the_recurrence(gate):
  arrays, options, cotangents, expected = reference(
    gate, 'state_segments', LENGTH
  )
  arrays, cotangents = jax.tree.map(np.float32, (arrays, cotangents))

  with jax.enable_x64(True):
    exact = jax.tree.map(np.float64, (arrays, cotangents))
    expected = vjp(*to_jax(exact), form='recurrent', **options)
    expected = jax.tree.map(np.asarray, expected)

  def errors(form):
    actual = vjp(
      to_jax(arrays), to_jax(cotangents), form=form, chunk_size=CHUNK, **options
    )
    return [
      np.abs(x - y).max() / np.abs(y).max()
      for x, y in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
      )
    ]

  for error, plain in zip(
    errors('chunkwise'), errors('recurrent'), strict=True
  ):
    assert error <= 2 * plain + 2e-7


HARD = {
  'zero': lambda rng, shape: np.zeros(shape),
  'reset': lambda rng, shape: np.full(shape, -1000.0),
  'mixture': lambda rng, shape: rng.choice(
    [0.0, -1000.0, -0.01, -3.0], shape, p=[0.3, 0.1, 0.3, 0.3]
  ),
  'near_underflow': lambda rng, shape: rng.choice(
    [-0.001, -60.0, -87.0, -103.0, -105.0], shape, p=[0.6] + [0.1] * 4
  ),
}


@pytest.mark.parametrize('wide', [False, True])
@pytest.mark.parametrize('hard', HARD)
def test_span_decays_are_accurate_in_float32(hard, wide):
  size = 64
  gate = HARD[hard](np.random.default_rng(0), (4, size)).astype(np.float32)
  expected = np.zeros((4, size, size))
  for i in range(size):
    for j in range(i + 1):
      expected[:, i, j] = np.exp(gate[:, j + 1 : i + 1].sum(1, np.float64))
  span_sums = functools.partial(gates.span_sums, wide=wide)
  spans, _, _ = optimized(span_sums)(jnp.asarray(gate))
  assert spans.max() <= 0
  np.testing.assert_allclose(np.tril(np.exp(spans)), expected, atol=3e-7)
  ones = jnp.ones((4, size, 1))
  decayed_scores = functools.partial(gates.decayed_scores, wide=wide)
  scores, _, _ = optimized(decayed_scores)(
    ones, ones, jnp.asarray(gate)[..., None]
  )
  np.testing.assert_allclose(scores, expected, atol=3e-7)


@pytest.mark.parametrize('gate', ['constant', 'scalar', 'channel'])
def test_hard_gates_are_right_with_their_gradients(gate):
  for hard in HARD:
    arrays, options = make(
      gate, LENGTH, state=True, segments=True, dtype=np.float32
    )
    shape = arrays['log_decay'].shape
    arrays['log_decay'] = HARD[hard](np.random.default_rng(1), shape)
    arrays = jax.tree.map(np.float32, arrays)
    cotangents = jax.tree.map(np.float32, cotangents_of(arrays, options))
    with jax.enable_x64(True):
      exact = jax.tree.map(np.float64, (arrays, cotangents))
      expected = vjp(*to_jax(exact), form='recurrent', **options)
      expected = jax.tree.map(np.asarray, expected)
    actual = vjp(
      to_jax(arrays),
      to_jax(cotangents),
      form='chunkwise',
      chunk_size=CHUNK,
      **options,
    )
    assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize('form', FORMS)
def test_minus_infinity_is_a_reset(form):
  arrays, options = make(
    'channel', LENGTH, state=True, segments=True, dtype=np.float32
  )
  arrays['log_decay'][:, ::5] = -np.inf
  cotangents = jax.tree.map(np.float32, cotangents_of(arrays, options))
  out, state, grads = vjp(
    to_jax(arrays), to_jax(cotangents), form=form, chunk_size=CHUNK, **options
  )
  expected = oracle.linear_attention(**arrays, **options)
  assert_close((out, state), expected, 2e-6)
  chex.assert_tree_all_finite(grads)


@pytest.mark.parametrize('form', FORMS)
def test_empty_denominators_give_zero_and_finite_gradients(form):
  arrays, _ = make('scalar', 13, options={'normalize': True}, dtype=np.float32)
  arrays['q'][:, 3] = 0
  arrays['k'][:, :2] = 0
  options = {'normalize': True}
  cotangents = jax.tree.map(np.float32, cotangents_of(arrays, options))
  out, state, grads = vjp(
    to_jax(arrays), to_jax(cotangents), form=form, chunk_size=8, **options
  )
  assert np.all(out[:, [0, 1, 3]] == 0)
  assert_close((out, state), oracle.linear_attention(**arrays, **options), 2e-6)
  chex.assert_tree_all_finite(grads)


def test_long_sequence():
  arrays, _ = make('channel', 4000, batch=1, dtype=np.float32)
  arrays['log_decay'] *= 0.01
  out, state = apply(to_jax(arrays))
  assert_close((out, state), oracle.linear_attention(**arrays), 5e-6)


@pytest.mark.parametrize('gate', ['none', 'channel'])
def test_bfloat16_error_is_within_twice_that_of_the_plain_form(gate):
  arrays, _ = make(gate, 64, kv_heads=4)
  decay = arrays.get('log_decay')
  low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arrays)
  if decay is not None:
    low['log_decay'] = jnp.asarray(decay, jnp.float32)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), low)
  expected, _ = oracle.linear_attention(**exact)
  sums = np.cumsum(exact.get('log_decay', np.zeros((1, 64, 1, 3))), axis=1)
  spans = np.where(
    np.tri(64, dtype=bool)[:, :, None, None],
    sums[:, :, None] - sums[:, None],
    0,
  )
  weights = jnp.asarray(
    np.exp(spans) * np.tri(64)[:, :, None, None], jnp.bfloat16
  )
  keys = low['k'][:, None] * weights  # [B, T, S, N, H]
  scores = jnp.einsum('btnh,btsnh->btsn', low['q'], keys)
  plain = jnp.einsum('btsn,bsnv->btnv', scores, low['v']) * CHANNELS**-0.5
  out, state = apply(low, chunk_size=16)
  assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  error = np.abs(np.asarray(out, np.float64) - expected).max()
  base = np.abs(np.asarray(plain, np.float64) - expected).max()
  assert error <= 2 * base
