"""Every form of PaTH attention against the tokens that turn all keys."""

import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from efficient_attn.ops.softmax.path_attention import (
  FORMS,
  Past,
  path_attention,
)
from tests.ops.attention_blockwise_test import equations
from tests.optimized import optimized
from tests.oracles import path_attention as oracle

B, N, H, V = 2, 2, 3, 4
CHUNK = 4
CUT = slice(6), slice(6, None)
every_form = pytest.mark.parametrize('form', sorted(FORMS))


def make(T, *, forget=True, dtype=np.float64, seed=0, hard=0.0):
  """Arrays of one call; w is normalised, beta is in [0, 2]."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape)  # noqa: E731
  w = normal(B, T, N, H)
  arrays = dict(
    q=normal(B, T, N, H),
    k=normal(B, T, N, H),
    v=normal(B, T, N, V),
    w=w / np.linalg.norm(w, axis=-1, keepdims=True),
    beta=2 * rng.random((B, T, N)),
  )
  if forget:
    soft = -rng.exponential(0.3, (B, T, N))
    arrays['log_forget'] = np.where(rng.random(soft.shape) < hard, -1000, soft)
  return {name: x.astype(dtype) for name, x in arrays.items()}


def make_ids(T, seed=3):
  rng = np.random.default_rng(seed)
  changes = rng.random((B, T)) < 0.3
  return (np.cumsum(changes, axis=1) % 2).astype(np.int32)


def make_past(arrays, length, room):
  """The past of float64 tokens, and the oracle's version of it."""
  _, keys, forget = oracle.path_attention(**arrays)
  rest = [(0, 0), (0, room - length), (0, 0)]
  past = Past(
    jnp.pad(keys, [*rest, (0, 0)]),
    jnp.pad(jnp.asarray(arrays['v']), [*rest, (0, 0)]),
    jnp.pad(forget, rest),
    jnp.int32(length),
  )
  return past, (keys, arrays['v'], forget)


@functools.cache
def call(form, chunk_size=CHUNK):
  options = dict(form=form, chunk_size=chunk_size)

  def vjp(arrays, weight, ids=None, state=None):
    def out(arrays):
      return path_attention(
        **arrays, segment_ids=ids, initial_state=state, **options
      )

    out, pull, state = jax.vjp(out, arrays, has_aux=True)
    return out, pull(weight)[0], state

  return jax.jit(vjp)


def close(x, y, tolerance):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@functools.cache
def reference(T, forget, segments):
  """Arrays, ids, weight, out and gradients, checked against the oracle."""
  arrays = make(T, forget=forget)
  ids = make_ids(T) if segments else None
  weight = np.random.default_rng(7).standard_normal((B, T, N, V))
  with jax.enable_x64(True):
    out, gradients, _ = call('recurrent')(arrays, weight, ids)
    gradients = jax.tree.map(np.asarray, gradients)
  close(out, oracle.path_attention(**arrays, segment_ids=ids)[0], 1e-13)
  rng = np.random.default_rng(8)
  step = {n: 1e-5 * rng.standard_normal(x.shape) for n, x in arrays.items()}

  def f(sign):
    moved = {n: x + sign * step[n] for n, x in arrays.items()}
    out, _, _ = oracle.path_attention(**moved, segment_ids=ids)
    return np.vdot(weight, out)

  slope = sum(np.vdot(gradients[n], step[n]) for n in arrays)
  np.testing.assert_allclose(slope, (f(1) - f(-1)) / 2, rtol=1e-6)
  return arrays, ids, weight, (out, gradients)


@pytest.mark.parametrize('form', ['blockwise', 'parallel'])
@pytest.mark.parametrize('forget, segments', [(False, True), (True, False)])
def test_forms_agree_in_outputs_and_gradients(form, forget, segments):
  arrays, ids, weight, expected = reference(13, forget, segments)
  with jax.enable_x64(True):
    found = call(form)(arrays, weight, ids)[:2]
  assert sorted(found[1]) == sorted(arrays)
  jax.tree.map(lambda x, y: close(x, y, 1e-12), found, expected)


def test_lengths():
  cases = {T: (make(T), make_ids(T)) for T in (1, 2, CHUNK - 1, CHUNK)}

  @jax.jit
  def run(cases):
    return {
      T: path_attention(
        **arrays, segment_ids=ids, form='blockwise', chunk_size=CHUNK
      )[0]
      for T, (arrays, ids) in cases.items()
    }

  with jax.enable_x64(True):
    found = run(cases)
  for T, (arrays, ids) in cases.items():
    close(found[T], oracle.path_attention(**arrays, segment_ids=ids)[0], 1e-13)


def test_no_direction_is_softmax_with_forget_gates():
  arrays = make(7) | {'beta': np.zeros((B, 7, N))}
  q, k, v, gate = (arrays[x] for x in ('q', 'k', 'v', 'log_forget'))
  logits = np.einsum('btnh,bsnh->bnts', q, k) / np.sqrt(H)
  for t, s in np.ndindex(7, 7):
    logits[..., t, s] += gate[:, s + 1 : t + 1].sum(1) if s <= t else -np.inf
  weights = np.exp(logits)
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum('bnts,bsnv->btnv', weights, v)
  with jax.enable_x64(True):
    close(call('blockwise')(arrays, v)[0], expected, 1e-12)


@pytest.mark.parametrize(
  'form, cut', [('blockwise', 1), ('blockwise', 6), ('recurrent', 6)]
)
def test_the_past_continues(form, cut):
  T, room = 11, 13
  arrays = make(T)
  out, keys, forget = oracle.path_attention(**arrays)
  head = {n: x[:, :cut] for n, x in arrays.items()}
  tail = {n: x[:, cut:] for n, x in arrays.items()}

  @jax.jit
  def run(tail, past):
    return path_attention(
      **tail, initial_state=past, form=form, chunk_size=CHUNK
    )

  with jax.enable_x64(True):
    past, seen = make_past(head, cut, room)
    found, state = run(tail, past)
  close(found, out[:, cut:], 1e-12)
  assert state.length == T
  close(state.key[:, :T], keys, 1e-12)
  close(state.value[:, :T], arrays['v'], 0)
  close(state.forget[:, :T], forget, 1e-12)
  close(oracle.path_attention(**tail, past=seen)[0], out[:, cut:], 1e-13)


@pytest.mark.in_turn
def test_gradients_through_the_past():
  arrays = make(11)
  head, tail = ({n: x[:, s] for n, x in arrays.items()} for s in CUT)
  weight = np.random.default_rng(1).standard_normal((B, 5, N, V))
  with jax.enable_x64(True):
    past, _ = make_past(head, 6, 11)
    found, expected = (
      call(form)(tail, weight, None, past)[1]
      for form in ('blockwise', 'recurrent')
    )
  jax.tree.map(lambda x, y: close(x, y, 1e-12), found, expected)


def test_packed_equals_separate():
  arrays = make(12)
  ids = np.repeat([[5, 1, 2, 5], [0, 1, 2, 3]], [5, 1, 1, 5], axis=1)
  weight = np.random.default_rng(1).standard_normal((B, 12, N, V))
  with jax.enable_x64(True):
    run = call('blockwise')
    out, gradients, _ = run(arrays, weight, ids)
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 12)):
      part = {n: x[:, a:b] for n, x in arrays.items()}
      alone, expected, _ = run(part, weight[:, a:b])
      close(out[:, a:b], alone, 1e-12)
      for name, gradient in gradients.items():
        close(gradient[:, a:b], expected[name], 1e-12)


@pytest.mark.in_turn
@pytest.mark.parametrize('form', ['blockwise', 'recurrent'])
def test_packed_rows_continue(form):
  arrays = make(12)
  # Across the cut, 6, goes on what began at 4, or at 0.
  ids = np.repeat([[5, 1, 2], [0, 0, 3]], [4, 5, 3], axis=1)
  with jax.enable_x64(True):
    expected, *_ = call('parallel')(arrays, arrays['v'], ids)
    empty = jax.tree.map(jnp.zeros_like, make_past(arrays, 12, 12)[0])
    state, parts = empty, []
    for part in CUT:
      piece = {n: x[:, part] for n, x in arrays.items()}
      out, _, state = call(form)(piece, piece['v'], ids[:, part], state)
      parts.append(out)
  close(jnp.concatenate(parts, 1), expected, 1e-12)
  np.testing.assert_array_equal(state.start, [9, 9])


@every_form
def test_causality_is_bitwise(form):
  T = 13
  arrays, other = make(T, dtype=np.float32), make(T, seed=5, dtype=np.float32)
  other['log_forget'] *= 1000
  op = optimized(
    lambda arrays: path_attention(**arrays, form=form, chunk_size=CHUNK)[0]
  )
  out = op(arrays)
  for cut in (1, 3, 4, 7, 12):
    mixed = {
      n: np.concatenate([x[:, :cut], other[n][:, cut:]], 1)
      for n, x in arrays.items()
    }
    found = op(mixed)
    np.testing.assert_array_equal(found[:, :cut], out[:, :cut], f'cut at {cut}')
    assert (found[:, cut:] != out[:, cut:]).any(), cut


@pytest.mark.parametrize('beta', [1.0, 2.0])
def test_float32_with_hard_gates_and_extreme_strengths(beta):
  T = 21
  arrays = make(T, dtype=np.float32, hard=0.2)
  arrays['beta'] = np.full_like(arrays['beta'], beta)
  # Directions that repeat: the worst case of the triangular solve.
  arrays['w'][:, 1:] = arrays['w'][:, :1]
  expected = oracle.path_attention(**arrays)[0]
  weight = expected.astype(np.float32)
  for form in sorted(FORMS):
    out, gradients, _ = call(form)(arrays, weight)
    close(out, expected, 5e-6)
    chex.assert_tree_all_finite(gradients)
  closed = dict(arrays, log_forget=np.full_like(arrays['beta'], -np.inf))
  for form in sorted(FORMS):
    out, gradients, _ = call(form)(closed, weight)
    close(out, arrays['v'], 1e-6)
    chex.assert_tree_all_finite(gradients)


def test_memory_is_linear_in_the_length():
  def largest(T):
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make(T))
    grad = jax.grad(
      lambda x: jnp.sum(path_attention(**x, form='blockwise', chunk_size=8)[0])
    )
    return max(
      var.aval.size
      for equation in equations(jax.make_jaxpr(grad)(arrays).jaxpr)
      for var in equation.outvars
    )

  # One row of blocks, and what is kept of every token.
  assert largest(512) == 2 * largest(256)


def test_bfloat16_and_the_default_form():
  arrays = jax.tree.map(jnp.asarray, make(9, dtype=np.float32))
  op = jax.jit(lambda arrays: path_attention(**arrays))
  exact, _ = op(arrays)
  half = {n: jnp.asarray(x, jnp.bfloat16) for n, x in arrays.items()}
  found, state = op(half)
  assert found.dtype == jnp.bfloat16 and state is None
  close(found.astype(np.float32), exact, 0.05)


@pytest.fixture
def unchecked():
  """Without annotations in the way of the errors that users see."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_calls(unchecked):
  arrays = jax.tree.map(jnp.asarray, make(4, dtype=np.float32))
  past, _ = make_past(arrays, 4, 6)
  with pytest.raises(ValueError, match='w has shape'):
    path_attention(**arrays | {'w': arrays['w'][:, :3]})
  with pytest.raises(ValueError, match='beta has shape'):
    path_attention(**arrays | {'beta': arrays['w']})
  with pytest.raises(ValueError, match='repeat the heads'):
    path_attention(**arrays | {'v': jnp.tile(arrays['v'], (1, 1, 2, 1))})
  with pytest.raises(ValueError, match='positive value'):
    path_attention(**arrays | {'log_forget': -arrays['log_forget']})
  with pytest.raises(ValueError, match="form = 'chunkwise'"):
    path_attention(**arrays, form='chunkwise')
  with pytest.raises(NotImplementedError, match="'pallas'"):
    path_attention(**arrays, implementation='pallas')
  with pytest.raises(ValueError, match='room for 3 tokens'):
    short = jax.tree.map(lambda x: x[:, :3] if x.ndim else x, past)
    path_attention(**arrays, initial_state=short)
