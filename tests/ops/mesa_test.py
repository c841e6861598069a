"""Every form of the Mesa layer against a least-squares fit per token."""

import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from efficient_attn.ops.recurrent import forms
from efficient_attn.ops.recurrent.mesa import mesa_recurrence
from tests.optimized import optimized
from tests.oracles import mesa as oracle

B, K, N, H, V = 2, 1, 2, 3, 4
CHUNK = 4
every_form = pytest.mark.parametrize('form', sorted(forms.FORMS))


def make(T, *, dtype=np.float64, seed=0, hard=0.0, state=False):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape)  # noqa: E731
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  soft = -rng.exponential(0.2, (B, T, N))
  arrays = dict(
    q=unit(normal(B, T, K, H)),
    k=unit(normal(B, T, K, H)),
    v=normal(B, T, N, V),
    log_decay=np.where(rng.random(soft.shape) < hard, -1000, soft),
    beta=rng.random((B, T, N)),
    ridge=0.25 + rng.random((N, H)),
  )
  if state:
    root = normal(B, N, H, H)
    arrays['initial_state'] = root @ root.swapaxes(-1, -2), normal(B, N, H, V)
  return jax.tree.map(lambda x: x.astype(dtype), arrays)


def make_ids(T, seed=3):
  rng = np.random.default_rng(seed)
  return (np.cumsum(rng.random((B, T)) < 0.25, axis=1) % 2).astype(np.int32)


@functools.cache
def call(form, chunk_size=CHUNK):
  def vjp(arrays, weight, ids=None):
    def run(arrays):
      # A symmetric perturbation: what the solver assumes of the state.
      if 'initial_state' in arrays:
        fit, memory = arrays['initial_state']
        fit = (fit + fit.swapaxes(-1, -2)) / 2
        arrays = arrays | {'initial_state': (fit, memory)}
      return mesa_recurrence(
        **arrays, segment_ids=ids, form=form, chunk_size=chunk_size
      )

    result, pull = jax.vjp(run, arrays)
    return *result, pull(weight)[0]

  return jax.jit(vjp)


def close(x, y, tolerance=1e-10):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def random_like(tree, seed=7):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape), tree)


@functools.cache
def reference(T, state, segments):
  """A case and its float64 results, checked against the oracle."""
  arrays = make(T, state=state)
  ids = make_ids(T) if segments else None
  expected = oracle.mesa(**arrays, segment_ids=ids)
  weight = random_like(expected)
  with jax.enable_x64(True):
    found = call('recurrent')(arrays, weight, ids)
  jax.tree.map(close, found[:2], expected)
  gradients = jax.tree.map(np.asarray, found[2])
  step = random_like(arrays, 8)
  if state:
    fit, memory = step['initial_state']
    step['initial_state'] = fit + fit.swapaxes(-1, -2), memory

  def f(size):
    moved = jax.tree.map(lambda x, d: x + size * d, arrays, step)
    result = oracle.mesa(**moved, segment_ids=ids)
    return sum(jax.tree.leaves(jax.tree.map(np.vdot, result, weight)))

  slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradients, step)))
  np.testing.assert_allclose(slope, (f(1e-5) - f(-1e-5)) / 2e-5, rtol=1e-6)
  return arrays, ids, weight, found


@pytest.mark.parametrize('form', ['chunkwise', 'parallel'])
@pytest.mark.parametrize('state, segments', [(False, False), (True, True)])
def test_forms_agree_in_outputs_states_and_gradients(form, state, segments):
  arrays, ids, weight, expected = reference(13, state, segments)
  with jax.enable_x64(True):
    found = call(form)(arrays, weight, ids)
  jax.tree.map(close, found, expected)


@pytest.mark.in_turn
def test_lengths():
  cases = {T: make(T) for T in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1)}
  ids = {T: make_ids(T) for T in cases}

  @jax.jit
  def run(cases, ids):
    return {
      T: mesa_recurrence(
        **arrays, segment_ids=ids[T], form='chunkwise', chunk_size=CHUNK
      )
      for T, arrays in cases.items()
    }

  with jax.enable_x64(True):
    found = run(cases, ids)
  for T, arrays in cases.items():
    expected = oracle.mesa(**arrays, segment_ids=ids[T])
    jax.tree.map(close, found[T], expected)


@pytest.mark.parametrize('form', ['chunkwise', 'recurrent'])
def test_state_continues_at_every_cut(form):
  T = 7
  arrays, ids = make(T), make_ids(T)
  expected = oracle.mesa(**arrays, segment_ids=ids)
  parts, states = {}, {}
  for cut in range(1, T):
    split = lambda s: {  # noqa: E731
      n: x if n == 'ridge' else x[:, s] for n, x in arrays.items()
    }
    head, tail = split(slice(cut)), split(slice(cut, None))
    state = oracle.mesa(**head, segment_ids=ids[:, :cut])[1]
    fresh = (ids[:, cut] != ids[:, cut - 1])[:, None, None, None]
    states[cut] = tuple(np.where(fresh, 0, s) for s in state)
    parts[cut] = tail, ids[:, cut:]

  @jax.jit
  def run(parts, states):
    return {
      cut: mesa_recurrence(
        **tail,
        segment_ids=ids,
        initial_state=states[cut],
        form=form,
        chunk_size=2,
      )
      for cut, (tail, ids) in parts.items()
    }

  with jax.enable_x64(True):
    found = run(parts, states)
  for cut, (out, state) in found.items():
    close(out, expected[0][:, cut:])
    jax.tree.map(close, state, expected[1])


def test_packed_equals_separate():
  arrays = make(12)
  ids = np.repeat([[5, 1, 2, 5], [0, 1, 2, 3]], [5, 1, 1, 5], axis=1)
  weight = random_like(oracle.mesa(**arrays))
  ridge = arrays.pop('ridge')
  with jax.enable_x64(True):
    run = call('chunkwise')
    out, state, gradients = run(arrays | {'ridge': ridge}, weight, ids)
    ridges = 0
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 12)):
      part = {n: x[:, a:b] for n, x in arrays.items()} | {'ridge': ridge}
      last = jax.tree.map(lambda x, b=b: x * (b == 12), weight[1])
      alone = run(part, (weight[0][:, a:b], last))
      close(out[:, a:b], alone[0])
      ridges += np.asarray(alone[2].pop('ridge'))
      for name, gradient in alone[2].items():
        close(gradients[name][:, a:b], gradient)
  close(gradients['ridge'], ridges)
  jax.tree.map(close, state, alone[1])


@every_form
def test_causality_is_bitwise(form):
  T = 13
  arrays, other = make(T, dtype=np.float32), make(T, seed=5, dtype=np.float32)
  other['log_decay'] *= 1000
  ridge = jnp.asarray(arrays.pop('ridge'))
  op = optimized(
    lambda arrays: mesa_recurrence(
      **arrays, ridge=ridge, form=form, chunk_size=CHUNK
    )[0]
  )
  out = op(arrays)
  for cut in (1, 3, 4, 7, 12):
    mixed = {
      n: np.concatenate([x[:, :cut], 3 * other[n][:, cut:]], 1)
      for n, x in arrays.items()
    }
    found = op(mixed)
    np.testing.assert_array_equal(found[:, :cut], out[:, :cut], f'cut at {cut}')
    assert (found[:, cut:] != out[:, cut:]).any(), cut


@pytest.mark.parametrize('gate', ['mixed', 'open', 'closed'])
def test_extreme_gates_in_float32(gate):
  T = 21
  arrays = make(T, dtype=np.float32, hard=0.2)
  if gate != 'mixed':
    value = 0.0 if gate == 'open' else -np.inf
    arrays['log_decay'] = np.full_like(arrays['log_decay'], value)
  arrays['beta'][:, 5] = 0  # nothing is written
  arrays['q'][:, 6] = 0  # nothing is asked
  expected = oracle.mesa(**arrays)
  weight = jax.tree.map(lambda x: x.astype(np.float32), expected)
  for form in sorted(forms.FORMS):
    out, state, gradients = call(form)(arrays, weight)
    close(out, expected[0], 2e-5)
    jax.tree.map(lambda x, y: close(x, y, 1e-5), state, expected[1])
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(out[:, 6], 0)


def test_more_channels_than_steps():
  # 30 steps for 48 channels, with keys that repeat and never decay.
  T, H = 64, 48
  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  k = unit(rng.standard_normal((1, T, 1, H)) + 0.5)
  q = unit(rng.standard_normal((1, T, 1, H)))
  arrays = dict(q=q, k=k, v=rng.standard_normal((1, T, 1, 2)))
  arrays['log_decay'] = np.zeros((1, T, 1))
  arrays['beta'] = np.ones((1, T, 1))
  arrays['ridge'] = np.full((1, H), 0.25)
  expected, _ = oracle.mesa(**arrays)
  arrays = {n: jnp.asarray(x, jnp.float32) for n, x in arrays.items()}

  @functools.partial(jax.jit, static_argnums=1)
  def error(arrays, steps):
    out, _ = mesa_recurrence(**arrays, num_steps=steps, form='parallel')
    return jnp.max(jnp.abs(out - expected.astype(np.float32)))

  errors = [error(arrays, steps) for steps in (8, 30)]
  assert errors[0] > 1e-3 > 1e-5 > errors[1]


def test_the_default_form_and_bfloat16():
  arrays = make(9, dtype=np.float32)
  op = jax.jit(lambda arrays: mesa_recurrence(**arrays)[0])
  exact = op(arrays)
  close(exact, oracle.mesa(**arrays)[0], 1e-5)
  half = {n: jnp.asarray(x, jnp.bfloat16) for n, x in arrays.items()}
  out = op(half)
  assert out.dtype == jnp.bfloat16
  close(out.astype(np.float32), exact, 0.05 * np.abs(exact).max())


@pytest.mark.in_turn
def test_second_derivatives():
  arrays = make(5)
  loss = lambda a, form: jnp.sum(  # noqa: E731
    jnp.sin(mesa_recurrence(**a, form=form, chunk_size=CHUNK)[0])
  )
  step = random_like(arrays)

  @functools.partial(jax.jit, static_argnums=1)
  def product(arrays, form):
    grad = jax.grad(functools.partial(loss, form=form))
    return jax.jvp(grad, (arrays,), (step,))[1]

  with jax.enable_x64(True):
    step = jax.tree.map(jnp.asarray, step)
    arrays = jax.tree.map(jnp.asarray, arrays)
    found, expected = (product(arrays, f) for f in ('chunkwise', 'recurrent'))
  jax.tree.map(lambda x, y: close(x, y, 1e-8), found, expected)


@pytest.fixture
def unchecked():
  """Our own errors, not those of the annotations that tests check."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_calls(unchecked):
  arrays = jax.tree.map(jnp.asarray, make(4, dtype=np.float32))
  _, (fit, memory) = mesa_recurrence(**arrays)
  cases = [
    ({'beta': arrays['q']}, 'beta has shape'),
    ({'ridge': arrays['ridge'][:1]}, 'ridge has shape'),
    ({'log_decay': -arrays['log_decay']}, 'positive value'),
    ({'initial_state': (memory, fit)}, r'initial_state\[0\]'),
    ({'num_steps': 0}, 'num_steps = 0'),
    ({'form': 'blockwise'}, "form = 'blockwise'"),
  ]
  for change, message in cases:
    with pytest.raises(ValueError, match=message):
      mesa_recurrence(**arrays | change)
