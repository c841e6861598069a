"""Properties of the elementwise recurrences, all against float64 loops."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.values import ConfigError
from tests.ops.elementwise_cases import (
  CASES,
  CHUNK,
  FORMS,
  assert_close,
  call,
  expected,
  make,
  reference,
  to_jax,
  vjp,
)
from tests.optimized import optimized

every_case = pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in sorted(CASES)],
)


@every_case
@pytest.mark.parametrize('length', [1, 3 * CHUNK + 1])
def test_forms_agree_with_the_loops_and_their_differences(name, length):
  arrays, ids, cotangents, results = reference(name, length)
  with jax.enable_x64(True):
    for form in FORMS[name][1:]:
      actual = vjp(
        name, to_jax(arrays), to_jax(cotangents), jnp.asarray(ids), form
      )
      assert_close(actual, results, 1e-10)


@every_case
def test_every_length(name):
  cases = [make(name, n) for n in (2, CHUNK - 1, CHUNK, CHUNK + 1, 17)]

  @jax.jit
  def run(cases):
    return [
      call(name, arrays, segment_ids=ids, form=FORMS[name][:2][-1])
      for arrays, ids in cases
    ]

  with jax.enable_x64(True):
    results = run(to_jax(cases))
  for (arrays, ids), result in zip(cases, results, strict=True):
    assert_close(result, expected(name, arrays, ids), 1e-12)


def pieces(arrays, cuts):
  """The tokens [B, T, ...] of arrays in pieces; the rest as it is."""
  length = cuts[-1]
  for a, b in itertools.pairwise(cuts):
    yield {
      key: x[:, a:b] if getattr(x, 'shape', (0, 0))[1] == length else x
      for key, x in arrays.items()
    }


@every_case
def test_packed_equals_separate(name):
  lengths = (CHUNK, 1, 1, CHUNK + 2, 1)
  cuts = np.cumsum((0, *lengths))
  arrays, _ = make(name, cuts[-1], state=False)
  ids = jnp.asarray(np.repeat((3, 1, 3, 0, 1), lengths)[None].repeat(2, 0))
  rng = np.random.default_rng(3)
  weight = rng.standard_normal((2, cuts[-1], 2, 3))

  def packed(arrays):
    out, state = call(name, arrays, segment_ids=ids, form=FORMS[name][:2][-1])
    return jnp.vdot(out, weight), (out, state)

  def separate(arrays):
    results = [
      call(name, piece, form='recurrent') for piece in pieces(arrays, cuts)
    ]
    out = jnp.concatenate([r[0] for r in results], 1)
    return jnp.vdot(out, weight), (out, results[-1][1])

  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    results = [
      jax.jit(jax.grad(f, has_aux=True))(arrays) for f in (packed, separate)
    ]
  assert_close(*results, 1e-11)


@every_case
@pytest.mark.parametrize('form', ['chunkwise', 'recurrent'])
def test_state_continues_at_every_cut(name, form):
  if form not in FORMS[name] or name == 'bidirectional':
    pytest.skip('there is no such form or state')
  length = CHUNK + 2
  arrays, ids = make(name, length)
  op, given = CASES[name]
  chunk = {} if name == 'slstm' else {'chunk_size': CHUNK}

  @jax.jit
  def run(arrays, ids):
    results = []
    for cut in range(1, length):
      both = dict(arrays, segment_ids=ids)
      first, second = pieces(both, (0, cut, length))
      a, state = op(**first, **given, **chunk, form=form)
      # A segment that starts at the cut: the caller drops the state.
      start = ids[:, cut] != ids[:, cut - 1]
      state = jax.tree.map(
        lambda s, start=start: jnp.where(
          start.reshape(-1, *[1] * (s.ndim - 1)), 0, s
        ),
        state,
      )
      second['initial_state'] = state
      b, state = call(name, second, form=form)
      results.append((jnp.concatenate([a, b], 1), state))
    return results

  with jax.enable_x64(True):
    results = run(to_jax(arrays), jnp.asarray(ids))
  for result in results:
    assert_close(result, expected(name, arrays, ids), 1e-11)


@every_case
def test_causal_to_the_bit(name):
  if name == 'bidirectional':
    pytest.skip('it is not causal')
  length = 3 * CHUNK + 1
  arrays, ids = make(name, length, dtype=np.float32)
  changed = {
    key: np.where(np.arange(length).reshape(-1, 1, 1)[: x.shape[1]] < 6, x, 0)
    if key in ('x', 'k', 'v', 'z', 'i', 'f', 'o')
    else x
    for key, x in arrays.items()
  }
  for form in FORMS[name]:
    run = optimized(functools.partial(call, name, form=form))
    a, b = (run(to_jax(x), segment_ids=ids)[0] for x in (arrays, changed))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert (a[:, 6:] != b[:, 6:]).any()


@pytest.mark.parametrize('name', sorted(set(CASES) - {'zoh'}))
def test_vmap_and_second_derivatives(name):
  arrays, ids = make(name, CHUNK + 1)
  direction, _ = make(name, CHUNK + 1, seed=5)

  def loss(form, arrays):
    out, _ = call(name, arrays, segment_ids=jnp.asarray(ids), form=form)
    return jnp.sum(out**3)

  @jax.jit
  def second(arrays):
    return [
      jax.jvp(jax.grad(functools.partial(loss, form)), (arrays,), (direction,))
      for form in FORMS[name][:2]
    ]

  def run(arrays, ids):
    arrays = jax.tree.map(
      lambda x, batched: x[None] if batched else x, arrays, is_batched(arrays)
    )
    out, state = call(name, arrays, segment_ids=ids[None])
    return out[0], jax.tree.map(lambda s: s[0], state)

  def is_batched(arrays):
    shared = ('A', 'D', 'bonus', 'recurrent', 'bias')
    if name in ('constant', 'wkv4'):
      shared += ('log_decay',)
    return {
      key: jax.tree.map(lambda _, key=key: key not in shared, x)
      for key, x in arrays.items()
    }

  with jax.enable_x64(True):
    arrays, direction = to_jax((arrays, direction))
    first, *others = second(arrays)
    for other in others:
      assert_close(other, first, 1e-9)
    axes = jax.tree.map(lambda b: 0 if b else None, is_batched(arrays))
    mapped = jax.jit(jax.vmap(run, (axes, 0)))
    assert_close(
      mapped(arrays, jnp.asarray(ids)), expected(name, arrays, ids), 1e-12
    )


@every_case
def test_wrong_calls(name):
  arrays, ids = make(name, 3, dtype=np.float32)
  arrays, ids = to_jax((arrays, ids))
  op, given = CASES[name]
  op = inspect.unwrap(op)  # without the annotation check, as users call it
  with pytest.raises(ValueError, match='form'):
    op(**arrays, **given, form='fast')
  with pytest.raises(
    NotImplementedError, match="no parallel form.*'recurrent'"
  ):
    op(**arrays, **given, form='parallel')
  unknown = "(pass None or 'xla'|implementation 'cuda' of \\w+ does not)"
  with pytest.raises((NotImplementedError, ConfigError), match=unknown):
    op(**arrays, **given, implementation='cuda')
  for key, x in arrays.items():
    if key in ('initial_state', 'recurrent') or x.ndim < 4:
      continue
    with pytest.raises(ValueError, match=r'has shape .*pass'):
      op(**{**arrays, key: x[:, :, :, :1]}, **given)
  with pytest.raises(ValueError, match='segment_ids has shape'):
    op(**arrays, **given, segment_ids=ids[:1])
