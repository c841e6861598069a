"""fast_weights and lact against loops over tokens, in every form."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.ops.recurrent.fast_weights import fast_weights, fresh_state
from efficient_attn.ops.recurrent.lact import large_chunk_fast_weights
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.ops.recurrent.muon import JORDAN, TUNED, orthogonalize
from tests.ops.fast_weights_cases import (
  CHUNK,
  HEADS,
  KINDS,
  apply,
  assert_close,
  call,
  cotangents_of,
  expected_of,
  make,
  segments,
  to_jax,
  vjp,
  without_count,
)
from tests.optimized import optimized
from tests.oracles import fast_weights as oracle

LENGTH = 13
SHARED = ('weights', 'norm', 'shares')  # by all tokens
# Packed, and with a state. What is left out is part of what is in.
CASES = [(kind, False) for kind in KINDS if kind not in ('mlp', 'titans')]
CASES += [(kind, True) for kind in ('mlp', 'ttt', 'titans', 'lact_muon')]


def slopes(kind, arrays, state, ids, cotangents):
  """Central differences of the loops along one direction per array."""
  rng = np.random.default_rng(2)
  inputs, tree = jax.tree.flatten((arrays, without_count(state)))

  def loss(inputs):
    arrays, parts = tree.unflatten(inputs)
    started = None if state is None else type(state)(*parts, state[-1])
    out, last = expected_of(kind, arrays, started, ids)
    pairs = zip(
      jax.tree.leaves((out, without_count(last))),
      jax.tree.leaves(cotangents),
      strict=True,
    )
    return sum(np.vdot(x, y) for x, y in pairs)

  for i, x in enumerate(inputs):
    direction = rng.standard_normal(x.shape)
    moved = [
      loss([*inputs[:i], x + step * direction, *inputs[i + 1 :]])
      for step in (1e-5, -1e-5)
    ]
    yield direction, (moved[0] - moved[1]) / 2e-5


@pytest.mark.parametrize('kind, packed', CASES)
def test_outputs_states_and_gradients(kind, packed):
  # Not packed: the path without masks. Packed: with a state as well.
  arrays, state = make(kind, LENGTH, state=packed)
  ids = segments(LENGTH) if packed else None
  expected = expected_of(kind, arrays, state, ids)
  cotangents = cotangents_of(expected)
  with jax.enable_x64(True):
    inputs = to_jax((arrays, cotangents, state))
    *actual, grads = vjp(kind, *inputs, ids, form='chunkwise')
    assert_close(actual, expected, 1e-11)
    if kind == 'titans':
      *actual, others = vjp(kind, *inputs, ids, form='recurrent')
      assert_close(actual, expected, 1e-11)
      assert_close(others, grads, 1e-10)
    elif packed:
      actual = apply(kind, inputs[0], inputs[2], ids, form='recurrent')
      assert_close(actual, expected, 1e-11)
    grads = jax.tree.map(np.asarray, grads)
  found = slopes(kind, arrays, state, ids, cotangents)
  for grad, (direction, slope) in zip(
    jax.tree.leaves(grads), found, strict=True
  ):
    np.testing.assert_allclose(
      np.vdot(grad, direction), slope, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('kind', ['lact', 'titans'])
def test_lengths(kind):
  with jax.enable_x64(True):
    for length in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1):
      arrays, _ = make(kind, length)
      expected = expected_of(kind, arrays)
      assert_close(apply(kind, to_jax(arrays)), expected, 1e-11)


@pytest.mark.parametrize('kind', ['lact', 'ttt', 'titans'])
def test_state_continues_at_every_cut(kind):
  arrays, state = make(kind, 7, state=True)
  whole = {n: arrays.pop(n) for n in SHARED if n in arrays}
  expected = expected_of(kind, {**arrays, **whole}, state)
  with jax.enable_x64(True):
    for cut in range(1, 7):
      now, outs = to_jax(state), []
      for span in (slice(cut), slice(cut, 7)):
        part = {name: x[:, span] for name, x in arrays.items()}
        out, now = apply(kind, to_jax({**part, **whole}), now)
        outs.append(out)
      assert_close((jnp.concatenate(outs, 1), now), expected, 1e-11)


@pytest.mark.parametrize('kind', ['lact', 'ttt'])
def test_packed_equals_separate(kind):
  lengths = (6, 1, 1, 6, 6)
  ids = np.repeat(np.array([4, 1, 2, 1, 7], np.int32), lengths)[None]
  arrays, _ = make(kind, sum(lengths), batch=1)
  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    out, state = apply(kind, arrays, ids=ids)
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
      part = {
        name: x if name in SHARED else x[:, start:end]
        for name, x in arrays.items()
      }
      separate, last = apply(kind, part)
      assert_close(out[:, start:end], separate, 1e-12)
    assert_close(state, last, 1e-12)


@pytest.mark.parametrize('kind', ['lact', 'ttt', 'titans'])
def test_causality_is_bitwise(kind):
  arrays, _ = make(kind, LENGTH, dtype=np.float32)
  other, _ = make(kind, LENGTH, seed=3, dtype=np.float32)
  ids, other_ids = segments(LENGTH), segments(LENGTH, seed=3)
  run = optimized(lambda arrays, ids: call(kind, arrays, ids=ids)[0])
  out = np.asarray(run(arrays, ids))
  for cut in (1, 3, 4, 5, 8, 12):

    def splice(x, y, cut=cut):
      return np.concatenate([x[:, :cut], y[:, cut:]], 1)

    changed = {
      name: x if name in SHARED else splice(x, other[name])
      for name, x in arrays.items()
    }
    changed = run(changed, splice(ids, other_ids))
    np.testing.assert_array_equal(
      changed[:, :cut], out[:, :cut], f'cut at {cut}'
    )
    assert np.any(changed[:, cut:] != out[:, cut:]), cut


@pytest.mark.in_turn
@pytest.mark.parametrize('gate', [0.0, -1000.0, -np.inf, 'mixture'])
def test_extreme_gates_in_float32(gate):
  arrays, _ = make('titans', LENGTH, dtype=np.float32)
  shape = arrays['log_decay'].shape
  rng = np.random.default_rng(5)
  for name in ('log_decay', 'log_momentum'):
    values = rng.choice([0.0, -0.3, -1000.0, -np.inf], shape)
    if gate != 'mixture':
      values = np.full(shape, gate)
    arrays[name] = values.astype(np.float32)
  wide = jax.tree.map(lambda x: x.astype(np.float64), arrays)
  ids = segments(LENGTH)
  expected = expected_of('titans', wide, ids=ids)
  cotangents = jax.tree.map(np.float32, cotangents_of(expected))
  out, state, (grads, _) = vjp(
    'titans', to_jax(arrays), to_jax(cotangents), ids=ids
  )
  assert_close((out, state), expected, 3e-6)
  chex.assert_tree_all_finite(grads)


def test_nothing_to_learn_leaves_lact_as_it_is():
  arrays, _ = make('lact_muon', LENGTH, dtype=np.float32)
  arrays['v'] = np.zeros_like(arrays['v'])
  cotangents = cotangents_of(expected_of('lact', _without_momentum(arrays)))
  cotangents = jax.tree.map(np.float32, cotangents)
  inputs = to_jax(_without_momentum(arrays)), to_jax(cotangents)
  _, state, (grads, _) = vjp('lact', *inputs)
  for x, y in zip(state.weights, arrays['weights'], strict=True):
    np.testing.assert_allclose(x, np.broadcast_to(y, x.shape), rtol=1e-6)
  chex.assert_tree_all_finite(grads)
  out, state = apply('lact_muon', to_jax(arrays))
  for x, y in zip(state.weights, arrays['weights'], strict=True):
    np.testing.assert_allclose(x, np.broadcast_to(y, x.shape), rtol=1e-6)


def _without_momentum(arrays):
  return {name: x for name, x in arrays.items() if name != 'momentum'}


@pytest.mark.parametrize(
  'kind, form',
  [('lact_muon', None), ('ttt', 'recurrent'), ('linear', 'chunkwise')],
)
def test_bidirectional(kind, form):
  arrays, _ = make(kind, LENGTH)
  ids = None if kind == 'lact_muon' else segments(LENGTH)
  expected, _ = expected_of(kind, arrays, ids=ids, bidirectional=True)
  with jax.enable_x64(True):
    options = dict(ids=ids, form=form, bidirectional=True)
    out, state = apply(kind, to_jax(arrays), **options)
    assert_close(out, expected, 1e-11)
  assert state is None


def _linear(length=LENGTH):
  """A linear model without a bias from zero: rates and the usual q, k, v."""
  arrays, _ = make('linear_l2', length)
  weight, _ = arrays.pop('weights')[0]
  return to_jax(arrays), ((jnp.zeros(weight.shape), None),)


def test_mini_batches_of_one_token_are_the_delta_rule():
  with jax.enable_x64(True):
    arrays, weights = _linear()
    rate = arrays.pop('learning_rate')
    out, state = fast_weights(
      **arrays, learning_rate=rate, weights=weights, chunk_size=1
    )
    expected, memory = delta_rule(**arrays, beta=rate, scale=1)
    assert_close(out, expected, 1e-12)
    assert_close(state.weights[0][0], memory, 1e-12)


def test_one_mini_batch_is_linear_attention():
  with jax.enable_x64(True):
    arrays, weights = _linear()
    rate = arrays.pop('learning_rate')
    out, state = fast_weights(
      **arrays, learning_rate=rate, weights=weights, chunk_size=16
    )
    arrays['v'] = rate[..., None] * arrays['v']
    expected, memory = linear_attention(**arrays, scale=1)
    assert_close(out, expected, 1e-12)
    assert_close(state.weights[0][0], memory, 1e-12)


def test_a_mini_batch_steps_by_its_mean_gradient():
  """With the shares of TTT, of a linear model from zero."""
  with jax.enable_x64(True):
    arrays, weights = _linear(CHUNK + 1)
    arrays['learning_rate'] = arrays['learning_rate'].at[:, -1].set(0)
    run = functools.partial(
      fast_weights, **arrays, weights=weights, chunk_size=CHUNK
    )
    out, _ = run(shares=1 / jnp.arange(1, CHUNK + 1))
    total, _ = run()
    counts = jnp.array([*range(1, CHUNK + 1), CHUNK])[:, None, None]
    assert_close(out, total / counts, 1e-12)


def test_updates_without_a_learning_rate_diverge():
  """Printed so (W <- W - sum of gradients, keys as they are) in a survey."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((1, 32, 1, 6)) for _ in range(3))
  weights = ((np.zeros((1, 6, 6)), None),)

  def norm(k, rate):
    rate = np.full((1, 32, 1), rate)
    run = jax.jit(functools.partial(fast_weights, chunk_size=1))
    with jax.enable_x64(True):
      _, state = run(q, k, v, rate, weights=weights)
    return np.linalg.norm(state.weights[0][0])

  assert norm(k, 1.0) > 1e6
  unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
  assert norm(unit, 1.0) < 20
  assert norm(k, 0.05) < 20


def test_normalisation_keeps_lact_where_it_started():
  arrays, _ = make('lact_muon', 32, batch=1)
  arrays['v'] *= 100
  out, state = apply('lact_muon', to_jax(arrays))
  for x, y in zip(state.weights, arrays['weights'], strict=True):
    assert np.abs(x - y).max() > 0.1
    np.testing.assert_allclose(
      np.linalg.norm(x[0], axis=-2), np.linalg.norm(y, axis=-2), rtol=1e-5
    )


@pytest.mark.parametrize(
  'steps, known, low, high',
  [(JORDAN, oracle.JORDAN, 0.6, 1.25), (TUNED, oracle.TUNED, 0.97, 1.04)],
)
def test_orthogonalize(steps, known, low, high):
  rng = np.random.default_rng(0)
  g = rng.standard_normal((2, 5, 3))
  with jax.enable_x64(True):
    run = jax.jit(functools.partial(orthogonalize, steps=steps))
    for x in (g, g.swapaxes(-2, -1)):
      actual = np.asarray(run(x))
      expected = np.stack([oracle.newton_schulz(y, known) for y in x])
      np.testing.assert_allclose(actual, expected, atol=1e-12)
      singular = np.linalg.svd(actual, compute_uv=False)
      assert low < singular.min() and singular.max() < high
      # The scale of the gradient does not matter, however small or large.
      for factor in (1e-200, 1e200):
        np.testing.assert_allclose(run(x * factor), expected, atol=1e-12)
  np.testing.assert_array_equal(orthogonalize(jnp.zeros((3, 2))), 0)


def test_wrong_calls():
  arrays = to_jax(make('linear', 3, dtype=np.float32)[0])
  op = inspect.unwrap(fast_weights)  # without the checks of annotations
  wrong = lambda **changed: op(**{**arrays, **changed})  # noqa: E731
  with pytest.raises(ValueError, match='learning_rate has shape'):
    wrong(learning_rate=arrays['learning_rate'][:, :2])
  weight, bias = arrays['weights'][0]
  with pytest.raises(ValueError, match=r'weights\[0\]\[0\] has shape'):
    wrong(weights=((weight[:, :2], bias),))
  with pytest.raises(ValueError, match=r'weights\[0\]\[1\] has shape'):
    wrong(weights=((weight, bias[:1]),))
  with pytest.raises(ValueError, match='shares has shape'):
    wrong(shares=jnp.ones(4))
  with pytest.raises(ValueError, match='no meaning with gates'):
    wrong(shares=jnp.ones(16), log_momentum=-arrays['learning_rate'])
  with pytest.raises(ValueError, match='weights is empty'):
    wrong(weights=())
  with pytest.raises(ValueError, match='pass equal ones'):
    wrong(v=arrays['v'][..., :2], weights=((weight[..., :2], None),))
  with pytest.raises(ValueError, match='positive value'):
    wrong(log_decay=jnp.ones_like(arrays['learning_rate']))
  with pytest.raises(ValueError, match='activation'):
    wrong(activation='relu')
  with pytest.raises(ValueError, match='power of two'):
    wrong(chunk_size=3)
  with pytest.raises(NotImplementedError, match="no form 'parallel'"):
    wrong(form='parallel')
  with pytest.raises(ValueError, match='form ='):
    wrong(form='dual')
  with pytest.raises(NotImplementedError, match='no implementation'):
    wrong(implementation='pallas_tpu')
  layers = arrays['weights']
  with pytest.raises(ValueError, match='initial_state has the shapes'):
    wrong(initial_state=fresh_state(layers, 3))
  with pytest.raises(ValueError, match='initial_state has the shapes'):
    wrong(initial_state=fresh_state(layers, 2, momentum=True))
  with pytest.raises(ValueError, match='no meaning'):
    wrong(initial_state=fresh_state(layers, 2), bidirectional=True)

  arrays, state = to_jax(make('lact', 3, state=True, dtype=np.float32))
  op = inspect.unwrap(large_chunk_fast_weights)
  with pytest.raises(ValueError, match='learning_rate has shape'):
    op(**{**arrays, 'learning_rate': arrays['learning_rate'][..., :2]})
  with pytest.raises(ValueError, match=r'weights\[1\] has shape'):
    w1, w2, w3 = arrays['weights']
    op(**{**arrays, 'weights': (w1, w2[:, :2], w3)})
  with pytest.raises(ValueError, match='initial_state has the shapes'):
    op(**arrays, momentum=jnp.ones((2, 3, HEADS)), initial_state=state)
  with pytest.raises(NotImplementedError, match='one sequence per row'):
    ids = jnp.zeros((2, 3), jnp.int32)
    op(**arrays, segment_ids=ids, bidirectional=True)
  with pytest.raises(ValueError, match='no meaning'):
    op(**arrays, initial_state=state, bidirectional=True)
