"""Every form of log-linear attention against its definition."""

import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from efficient_attn.ops.recurrent import forms
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.ops.recurrent.log_linear import log_linear_attention
from tests.optimized import optimized
from tests.oracles import log_linear as oracle

B, K, N, H, V = 2, 1, 2, 3, 4
CHUNK = 4
LEVELS = 6  # enough for 32 tokens
every_form = pytest.mark.parametrize('form', sorted(forms.FORMS))


def make(T, *, levels=LEVELS, dtype=np.float64, seed=0, hard=0.0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape)  # noqa: E731
  soft = -rng.exponential(0.2, (B, T, N))
  arrays = dict(
    q=normal(B, T, K, H),
    k=normal(B, T, K, H),
    v=normal(B, T, N, V),
    log_decay=np.where(rng.random(soft.shape) < hard, -1000, soft),
    level_scales=normal(B, T, N, levels),
  )
  return {name: x.astype(dtype) for name, x in arrays.items()}


def make_ids(T, seed=3):
  rng = np.random.default_rng(seed)
  return (np.cumsum(rng.random((B, T)) < 0.15, axis=1) % 2).astype(np.int32)


@functools.cache
def call(form, chunk_size=CHUNK):
  """The vjp with respect to the arrays and the buckets before token 0."""

  def vjp(arrays, weight, ids=None, memory=None, count=None):
    def run(arrays, memory):
      state = None if memory is None else (memory, count)
      out, (memory, after) = log_linear_attention(
        **arrays,
        segment_ids=ids,
        initial_state=state,
        form=form,
        chunk_size=chunk_size,
      )
      return (out, memory), after

    out, pull, after = jax.vjp(run, arrays, memory, has_aux=True)
    return *out, after, pull(weight)

  return jax.jit(vjp)


def close(x, y, tolerance=1e-12):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@functools.cache
def reference(T, segments):
  """A case and its float64 results, checked against the definition."""
  arrays = make(T)
  ids = make_ids(T) if segments else None
  rng = np.random.default_rng(7)
  expected, (memory, count) = oracle.log_linear_attention(
    **arrays, segment_ids=ids
  )
  weight = tuple(rng.standard_normal(x.shape) for x in (expected, memory))
  with jax.enable_x64(True):
    found = call('recurrent')(arrays, weight, ids)
  close(found[0], expected)
  close(found[1], memory)
  np.testing.assert_array_equal(found[2], count)
  gradients = jax.tree.map(np.asarray, found[3][0])
  step = {n: 1e-5 * rng.standard_normal(x.shape) for n, x in arrays.items()}

  def f(sign):
    moved = {n: x + sign * step[n] for n, x in arrays.items()}
    out, (memory, _) = oracle.log_linear_attention(**moved, segment_ids=ids)
    return np.vdot(weight[0], out) + np.vdot(weight[1], memory)

  slope = sum(np.vdot(gradients[n], step[n]) for n in arrays)
  np.testing.assert_allclose(slope, (f(1) - f(-1)) / 2, rtol=1e-6)
  return arrays, ids, weight, found


def test_levels_are_digits_of_the_difference():
  for t in range(70):
    assert oracle.levels(t) == [(t ^ s).bit_length() for s in range(t + 1)]


@pytest.mark.parametrize('form', ['chunkwise', 'parallel'])
@pytest.mark.parametrize('segments', [False, True])
def test_forms_agree_in_outputs_states_and_gradients(form, segments):
  arrays, ids, weight, expected = reference(21, segments)
  with jax.enable_x64(True):
    found = call(form)(arrays, weight, ids)
  jax.tree.map(close, found, expected)


@pytest.mark.in_turn
def test_lengths_and_chunk_sizes():
  lengths = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1)
  cases = {(T, CHUNK): (make(T), make_ids(T)) for T in lengths}
  cases |= {(13, C): (make(13), make_ids(13)) for C in (1, 2, 8)}

  @jax.jit
  def run(arrays):
    return {
      (T, C): log_linear_attention(
        **arrays[T, C],
        segment_ids=jnp.asarray(cases[T, C][1]),
        form='chunkwise',
        chunk_size=C,
      )
      for T, C in cases
    }

  with jax.enable_x64(True):
    found = run({case: arrays for case, (arrays, _) in cases.items()})
  for case, (arrays, ids) in cases.items():
    expected = oracle.log_linear_attention(**arrays, segment_ids=ids)
    jax.tree.map(close, found[case], expected)


@pytest.mark.parametrize('form', ['chunkwise', 'recurrent'])
def test_state_continues_at_every_cut(form):
  T = 21
  arrays, ids = make(T), make_ids(T)
  expected = oracle.log_linear_attention(**arrays, segment_ids=ids)

  # One program for all cuts: what is behind the cut is a segment of its own.
  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, None, 0))
  def run(cut, arrays, state):
    rolled = {n: jnp.roll(x, -cut, axis=1) for n, x in arrays.items()}
    behind = jnp.arange(T) >= T - cut
    row = jnp.where(behind, 9, jnp.roll(jnp.asarray(ids), -cut, axis=1))
    return log_linear_attention(
      **rolled,
      segment_ids=row,
      initial_state=state,
      form=form,
      chunk_size=CHUNK,
    )[0]

  cuts = np.arange(1, T)
  # A segment that starts at the cut begins with an empty state.
  states = []
  for cut in cuts:
    head = {n: x[:, :cut] for n, x in arrays.items()}
    memory, count = oracle.log_linear_attention(
      **head, segment_ids=ids[:, :cut]
    )[1]
    fresh = ids[:, cut] != ids[:, cut - 1]
    memory = np.where(fresh[:, None, None, None, None], 0, memory)
    states.append((memory, np.where(fresh, 0, count)))
  states = jax.tree.map(lambda *x: np.stack(x), *states)
  with jax.enable_x64(True):
    found = run(jnp.asarray(cuts), arrays, states)
  for cut, out in zip(cuts, found, strict=True):
    close(out[:, : T - cut], expected[0][:, cut:])


@pytest.mark.in_turn
def test_gradients_through_the_state_and_fewer_buckets():
  T, cut = 12, 5
  arrays, ids = make(T), make_ids(T)
  head = {n: x[:, :cut] for n, x in arrays.items()}
  tail = {n: x[:, cut:] for n, x in arrays.items()}
  expected = oracle.log_linear_attention(**arrays)[0][:, cut:]
  memory, count = oracle.log_linear_attention(**head)[1]
  memory = memory[:, :, :4]  # as many as 12 tokens fill
  rng = np.random.default_rng(2)
  weight = tuple(rng.standard_normal(x.shape) for x in (expected, memory))
  with jax.enable_x64(True):
    found = [
      call(form)(tail, weight, None, memory, count)
      for form in ('recurrent', 'chunkwise')
    ]
    packed = [
      call(form)(tail, weight, ids[:, cut:], memory, count)
      for form in ('recurrent', 'chunkwise')
    ]
  close(found[0][0], expected)
  jax.tree.map(close, *found)
  jax.tree.map(close, *packed)


@every_form
def test_the_last_level_holds_what_is_further_away(form):
  T = 21
  arrays = make(T, levels=3)
  expected = oracle.log_linear_attention(**arrays)
  weight = tuple(expected[i] if i == 0 else expected[1][0] for i in (0, 1))
  with jax.enable_x64(True):
    out, memory, count, _ = call(form)(arrays, weight)
  close(out, expected[0])
  close(memory, expected[1][0])
  np.testing.assert_array_equal(count, T)


def test_equal_scales_are_linear_attention():
  arrays = make(13)
  arrays['level_scales'] = np.full_like(arrays['level_scales'], 0.7)

  @jax.jit
  def run(level_scales, **arrays):
    out, (memory, _) = log_linear_attention(
      **arrays,
      level_scales=level_scales,
      form='chunkwise',
      chunk_size=CHUNK,
    )
    return out, memory.sum(2), *linear_attention(**arrays)

  with jax.enable_x64(True):
    out, memory, expected, state = run(**arrays)
  close(out, 0.7 * np.asarray(expected))
  close(memory, state)


def test_packed_equals_separate():
  arrays = make(12)
  ids = np.repeat([[5, 1, 2, 5], [0, 1, 2, 3]], [5, 1, 1, 5], axis=1)
  rng = np.random.default_rng(1)
  memory = (B, N, LEVELS - 1, H, V)
  weight = rng.standard_normal((B, 12, N, V)), rng.standard_normal(memory)
  with jax.enable_x64(True):
    run = call('chunkwise')
    out, memory, count, (gradients, _) = run(arrays, weight, ids)
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 12)):
      part = {n: x[:, a:b] for n, x in arrays.items()}
      last = weight[1] * (b == 12)
      alone = run(part, (weight[0][:, a:b], last))
      close(out[:, a:b], alone[0])
      for name, gradient in gradients.items():
        close(gradient[:, a:b], alone[3][0][name])
  close(memory, alone[1])
  np.testing.assert_array_equal(count, alone[2])


@every_form
def test_causality_is_bitwise(form):
  T = 21
  arrays, other = make(T, dtype=np.float32), make(T, seed=5, dtype=np.float32)
  other['log_decay'] *= 1000
  ids, other_ids = make_ids(T), make_ids(T, seed=4)
  op = optimized(
    lambda arrays, ids: log_linear_attention(
      **arrays, segment_ids=ids, form=form, chunk_size=CHUNK
    )[0]
  )
  out = op(arrays, ids)

  def splice(x, y, cut):
    return np.concatenate([x[:, :cut], y[:, cut:]], 1)

  for cut in (1, 3, 4, 7, 16, 20):
    mixed = {n: splice(x, other[n], cut) for n, x in arrays.items()}
    found = op(mixed, splice(ids, other_ids, cut))
    np.testing.assert_array_equal(found[:, :cut], out[:, :cut], f'cut at {cut}')
    assert (found[:, cut:] != out[:, cut:]).any(), cut


@pytest.mark.parametrize('gate', ['mixed', 'open', 'closed'])
def test_extreme_gates_in_float32(gate):
  T = 21
  arrays = make(T, dtype=np.float32, hard=0.2)
  if gate != 'mixed':
    value = 0.0 if gate == 'open' else -np.inf
    arrays['log_decay'] = np.full_like(arrays['log_decay'], value)
  expected, (memory, _) = oracle.log_linear_attention(**arrays)
  weight = expected.astype(np.float32), memory.astype(np.float32)
  for form in sorted(forms.FORMS):
    out, state, _, gradients = call(form)(arrays, weight)
    close(out, expected, 1e-5)
    close(state, memory, 1e-5)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.in_turn
def test_the_default_form_and_bfloat16():
  arrays = make(9, dtype=np.float32)
  op = jax.jit(lambda arrays: log_linear_attention(**arrays)[0])
  exact = op(arrays)
  close(exact, oracle.log_linear_attention(**arrays)[0], 1e-5)
  weight = exact, jnp.zeros((B, N, LEVELS - 1, H, V))
  wanted = call('chunkwise')(arrays, weight)[3][0]
  found = jax.jit(jax.grad(lambda x: jnp.sum(op(x) * weight[0])))(arrays)
  jax.tree.map(lambda x, y: close(x, y, 2e-5), found, wanted)
  half = {n: jnp.asarray(x, jnp.bfloat16) for n, x in arrays.items()}
  out = op(half)
  assert out.dtype == jnp.bfloat16
  close(out.astype(np.float32), exact, 0.05 * np.abs(exact).max())


@pytest.fixture
def unchecked():
  """Our own errors, not those of the annotations that tests check."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_calls(unchecked):
  arrays = jax.tree.map(jnp.asarray, make(4, dtype=np.float32))
  _, (memory, count) = log_linear_attention(**arrays)
  one = arrays['level_scales'][..., :1]
  cases = [
    ({'level_scales': one}, 'L >= 2 levels'),
    ({'level_scales': arrays['level_scales'][:, :3]}, 'level_scales has shape'),
    ({'log_decay': arrays['q']}, 'log_decay has shape'),
    ({'log_decay': -arrays['log_decay']}, 'positive value'),
    ({'initial_state': (memory[:, :, :0], count)}, 'has 0 buckets'),
    ({'initial_state': (memory, count[:1])}, r'initial_state\[1\]'),
    ({'form': 'blockwise'}, "form = 'blockwise'"),
  ]
  for change, message in cases:
    with pytest.raises(ValueError, match=message):
      log_linear_attention(**arrays | change)
