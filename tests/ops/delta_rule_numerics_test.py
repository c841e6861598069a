"""Rounding of the delta rule and dplr: float32, bfloat16, hard gates."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.triangular import solve_unit_lower
from tests.ops.delta_rule_cases import (
  CHUNK,
  ORACLES,
  apply,
  cotangents,
  make,
  segments,
  vjp,
)
from tests.ops.linear_attention_cases import assert_close, to_jax
from tests.oracles import delta_rule as oracle

HARD = {
  'zero': ([0.0], [1.0]),
  'reset': ([-1000.0], [1.0]),
  'mixture': ([0.0, -1000.0, -0.01, -3.0], [0.3, 0.1, 0.3, 0.3]),
  'infinite': ([-np.inf, -0.01], [0.1, 0.9]),
}


@pytest.mark.parametrize('gate', ['scalar', 'channel'])
@pytest.mark.parametrize('op', ['delta', 'dplr'])
def test_hard_gates_are_right_with_their_gradients(op, gate):
  for values, chances in HARD.values():
    arrays = make(op, gate)
    shape = arrays['log_decay'].shape
    rng = np.random.default_rng(1)
    arrays['log_decay'] = rng.choice(values, shape, p=chances)
    arrays = jax.tree.map(np.float32, arrays)
    given = jax.tree.map(np.float32, cotangents())
    run = functools.partial(vjp, op=op)
    with jax.enable_x64(True):
      exact = to_jax(jax.tree.map(np.float64, (arrays, given)))
      expected = run(*exact, segments(), form='recurrent')
      expected = jax.tree.map(np.asarray, expected)
    actual = run(
      *to_jax((arrays, given)), segments(), form='chunkwise', chunk_size=CHUNK
    )
    assert_close(actual, expected, 3e-6)


def errors_in_float32(arrays, op, forms):
  exact = ORACLES[op](**jax.tree.map(np.float64, arrays))
  found = []
  for form in forms:
    actual = apply(to_jax(arrays), op=op, form=form, chunk_size=64)
    chex.assert_tree_all_finite(actual)
    found.append(
      [
        np.abs(x - y).max() / np.abs(y).max()
        for x, y in zip(actual, exact, strict=True)
      ]
    )
  return found


# Length of the keys, beta, whether they repeat, channels, allowed error.
KEYS = {
  'normalised': (1.0, 1.0, False, 32, 2),
  'negative eigenvalues': (1.0, 2.0, False, 32, 2),
  'unnormalised': (1.02, 2.0, False, 32, 2),
  # Updates of one key telescope: what is read is a sum of C that cancel.
  'repeated': (1.0, 1.0, True, 32, 8),
  # The rounding of |k|^2 = 1, the same for every token of a chunk, adds up:
  # a backward error of one unit in the last place of beta.
  'repeated reflections': (1.0, 2.0, True, 32, 60),
}


@pytest.mark.parametrize('kind', KEYS)
def test_float32_error_is_within_twice_that_of_the_recurrence(kind):
  length, beta, repeat, channels, allowed = KEYS[kind]
  plain, chunkwise = [], []
  for seed in range(3):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 1, 150, 4, channels))
    k *= length / np.linalg.norm(k, axis=-1, keepdims=True)
    if repeat:
      k = np.broadcast_to(k[:, :1], k.shape)
    arrays = dict(q=q, k=k, v=v, beta=np.full(k.shape[:3], beta))
    arrays = jax.tree.map(np.float32, arrays)
    first, second = errors_in_float32(
      arrays, 'delta', ('recurrent', 'chunkwise')
    )
    plain.append(first)
    chunkwise.append(second)
  error, base = np.median(chunkwise, 0), np.median(plain, 0)
  assert (error <= allowed * base + 2e-7).all(), (error, base)


def test_long_sequence():
  arrays = make('delta', 'channel', 4000, state=False)
  k = arrays['k']
  arrays['k'] = k / np.linalg.norm(k, axis=-1, keepdims=True)
  arrays['log_decay'] *= 0.01
  arrays = {k: np.float32(x[:1, :, :1]) for k, x in arrays.items()}
  (errors,) = errors_in_float32(arrays, 'delta', ['chunkwise'])
  assert max(errors) < 5e-6


def test_bfloat16_operands():
  arrays = make('delta', 'channel', 64, state=False)
  low = {
    name: jnp.asarray(x, jnp.float32 if name == 'log_decay' else jnp.bfloat16)
    for name, x in arrays.items()
  }
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), low)
  expected, _ = oracle.delta_rule(**exact)
  out, state = apply(low, op='delta', chunk_size=16)
  assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  error = np.abs(np.asarray(out, np.float64) - expected).max()
  assert error < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize('wide', [False, True])
def test_triangular_solve_and_its_derivatives(wide):
  solve = functools.partial(solve_unit_lower, wide=wide)
  rng = np.random.default_rng(0)
  for size in (1, 2, 16):
    lower, lower_dot = np.tril(rng.standard_normal((2, 3, size, size)), -1)
    rhs, rhs_dot = rng.standard_normal((2, 3, size, 5))
    with jax.enable_x64(True):
      primals, tangents = to_jax(((lower, rhs), (lower_dot, rhs_dot)))
      solution, slope = jax.jvp(solve, primals, tangents)
      inverse = np.linalg.inv(np.eye(size) + lower)
      expected = inverse @ rhs
      assert_close(solution, expected, 1e-12)
      expected = inverse @ (rhs_dot - lower_dot @ expected)
      assert_close(slope, expected, 1e-12)
      _, pull = jax.vjp(solve, *primals)
      paired = sum(map(np.vdot, pull(tangents[1]), tangents))
      np.testing.assert_allclose(paired, np.vdot(slope, rhs_dot), rtol=1e-12)
