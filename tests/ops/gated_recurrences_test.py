"""mLSTM, slot attention and the trapezoidal scan against their recurrences."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.gated_slot_attention import (
  gated_slot_attention,
)
from efficient_attn.ops.recurrent.mlstm import mlstm
from efficient_attn.ops.recurrent.trapezoid import trapezoidal_scan
from tests.oracles import gated as oracles

CHUNK, LENGTH = 4, 17
BATCH, HEADS, CHANNELS, VALUES, SLOTS = 2, 2, 4, 3, 5
FORMS = ('chunkwise', 'parallel', 'recurrent')


def make_mlstm(normal, length):
  heads = (BATCH, length, HEADS)
  return dict(
    q=normal(BATCH, length, 1, CHANNELS),
    k=normal(BATCH, length, 1, CHANNELS),
    v=normal(*heads, VALUES),
    input_gate=2 * normal(*heads),
    log_forget=-0.3 * np.exp(normal(*heads)),
    initial_state=(
      normal(BATCH, HEADS, CHANNELS, VALUES),
      normal(BATCH, HEADS, CHANNELS),
      np.exp(normal(BATCH, HEADS)),
    ),
  )


def make_slots(normal, length):
  heads = (BATCH, length, HEADS)
  return dict(
    q=2 * normal(*heads, CHANNELS),
    k=normal(*heads, CHANNELS),
    v=normal(*heads, VALUES),
    log_decay=-0.3 * np.exp(normal(*heads, SLOTS)),
    initial_state=(
      normal(BATCH, HEADS, SLOTS, CHANNELS),
      normal(BATCH, HEADS, SLOTS, VALUES),
    ),
  )


def make_trapezoid(normal, length):
  heads, state = (BATCH, length, HEADS), (BATCH, HEADS)
  return dict(
    q=normal(*heads, CHANNELS),
    k=normal(*heads, CHANNELS),
    v=normal(*heads, VALUES),
    log_decay=-0.3 * np.exp(normal(*heads)),
    dt=np.exp(normal(*heads)),
    right=1 / (1 + np.exp(normal(*heads))),
    angles=2 * normal(*heads, 1),
    initial_state=(
      normal(*state, CHANNELS, VALUES),
      normal(*state, CHANNELS),
      normal(*state, VALUES),
      np.exp(normal(*state)),
      np.abs(normal(*state, 1)),
    ),
  )


OPS = {
  'mlstm': (mlstm, oracles.mlstm, make_mlstm),
  'gated_slot_attention': (
    gated_slot_attention,
    oracles.gated_slot_attention,
    make_slots,
  ),
  'trapezoidal_scan': (
    trapezoidal_scan,
    oracles.trapezoidal_scan,
    make_trapezoid,
  ),
}
every_op = pytest.mark.parametrize('name', sorted(OPS))


def make(name, length=LENGTH, seed=0):
  """Arrays with a state, and segment ids with boundaries everywhere."""
  rng = np.random.default_rng(seed)
  arrays = OPS[name][2](lambda *shape: rng.standard_normal(shape), length)
  ids = np.cumsum(rng.random((BATCH, length)) < 0.25, axis=1) % 3
  return arrays, ids.astype(np.int32)


def cast(tree, dtype=None):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


@functools.partial(
  jax.jit,
  static_argnames=('name', 'form', 'chunk_size'),
)
def apply(arrays, segment_ids=None, *, name, **options):
  return OPS[name][0](**arrays, segment_ids=segment_ids, **options)


@functools.partial(
  jax.jit,
  static_argnames=('name', 'form', 'chunk_size'),
)
def vjp(arrays, cotangents, segment_ids=None, *, name, **options):
  """Output, state and the gradient of every array."""

  def call(arrays):
    return OPS[name][0](**arrays, segment_ids=segment_ids, **options)

  result, pull = jax.vjp(call, arrays)
  return *result, pull(cotangents)[0]


def assert_close(actual, expected, tolerance):
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  for x, y in zip(actual, expected, strict=True):
    assert x.shape == y.shape
    np.testing.assert_allclose(
      x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max())
    )


@functools.cache
def reference(name, segments):
  """A case with its float64 results: outputs and state are those of the
  numpy loops, gradients those of the recurrent form, which agree with central
  differences of the loops along random directions of each array.
  """
  arrays, ids = make(name)
  ids = ids if segments else None
  oracle = functools.partial(OPS[name][1], segment_ids=ids)
  expected = oracle(**arrays)
  rng = np.random.default_rng(1)
  cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape), expected)
  with jax.enable_x64(True):
    out, state, grads = vjp(
      cast(arrays), cast(cotangents), ids, name=name, form='recurrent'
    )
    grads = jax.tree.map(np.asarray, grads)
  assert_close((out, state), expected, 1e-12)

  def loss(arrays):
    return sum(
      jax.tree.leaves(jax.tree.map(np.vdot, oracle(**arrays), cotangents))
    )

  for key, value in arrays.items():
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), value)

    def moved(step, key=key, value=value, direction=direction):
      return {
        **arrays,
        key: jax.tree.map(lambda x, d: x + step * d, value, direction),
      }

    slope = (loss(moved(1e-6)) - loss(moved(-1e-6))) / 2e-6
    products = jax.tree.leaves(jax.tree.map(np.vdot, grads[key], direction))
    np.testing.assert_allclose(
      sum(products), slope, rtol=1e-5, atol=1e-6, err_msg=key
    )
  return arrays, ids, cotangents, (*expected, grads)


@every_op
@pytest.mark.parametrize(
  'segments', [pytest.param(False, marks=pytest.mark.exhaustive), True]
)
@pytest.mark.parametrize('form', ['chunkwise', 'parallel'])
def test_forms_agree_in_outputs_states_and_gradients(name, segments, form):
  arrays, ids, cotangents, expected = reference(name, segments)
  with jax.enable_x64(True):
    actual = vjp(
      cast(arrays),
      cast(cotangents),
      ids,
      name=name,
      form=form,
      chunk_size=CHUNK,
    )
  assert_close(actual, expected, 1e-10)


@every_op
@pytest.mark.parametrize('length', [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 13])
def test_lengths(name, length):
  arrays, ids = make(name, length)
  expected = OPS[name][1](**arrays, segment_ids=ids)
  with jax.enable_x64(True):
    actual = apply(
      cast(arrays), ids, name=name, form='chunkwise', chunk_size=CHUNK
    )
  assert_close(actual, expected, 1e-12)


@every_op
def test_packed_equals_separate_and_states_continue(name):
  arrays, _ = make(name, 13)
  ids = np.repeat([[3, 1, 3, 2]], BATCH, 0).repeat([5, 1, 4, 3], axis=1)
  cuts = (0, 5, 6, 10, 13)
  state = arrays.pop('initial_state')

  def run(low, high, state, ids=None):
    part = {key: x[:, low:high] for key, x in arrays.items()}
    part |= {} if state is None else {'initial_state': state}
    return apply(cast(part), ids, name=name, form='chunkwise', chunk_size=CHUNK)

  with jax.enable_x64(True):
    packed, last = run(0, 13, state, ids)
    parts = [
      run(a, b, state if a == 0 else None)
      for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    separate = np.concatenate([out for out, _ in parts], axis=1)
    assert_close((packed, last), (separate, parts[-1][1]), 1e-12)

    # Whole, against every cut in two with the state passed on.
    whole = run(0, 13, state)
    for cut in (1, 6):
      first, middle = run(0, cut, state)
      second, end = run(cut, 13, middle)
      assert_close((np.concatenate([first, second], 1), end), whole, 1e-12)


@every_op
@pytest.mark.parametrize('form', FORMS)
def test_causal_to_the_bit(name, form):
  arrays, ids = make(name)
  state = arrays.pop('initial_state')
  options = dict(name=name, form=form, chunk_size=CHUNK)

  def run(arrays, ids):
    arrays = cast(arrays | {'initial_state': state}, jnp.float32)
    return np.asarray(apply(arrays, ids, **options)[0])

  out = run(arrays, ids)
  for cut in (1, CHUNK, 10):
    changed = {key: x.copy() for key, x in arrays.items()}
    for x in changed.values():
      x[:, cut:] *= 1.7
    new_ids = ids.copy()
    new_ids[:, cut:] = 7
    changed = run(changed, new_ids)
    np.testing.assert_array_equal(
      changed[:, :cut], out[:, :cut], f'cut at {cut}'
    )
    assert (changed[:, cut:] != out[:, cut:]).any(), cut


EXTREME = {
  'mlstm': ('log_forget', 'input_gate'),
  'gated_slot_attention': ('log_decay', None),
  'trapezoidal_scan': ('log_decay', None),
}


@every_op
@pytest.mark.parametrize('gate', [0.0, -1000.0, 'mixed'])
def test_extreme_gates_are_finite_and_right_in_float32(name, gate):
  arrays, ids = make(name)
  rng = np.random.default_rng(3)
  decay, write = EXTREME[name]
  shape = arrays[decay].shape
  hard = rng.choice([0.0, -1e-3, -1.0, -30.0, -1000.0], shape)
  arrays[decay] = hard if gate == 'mixed' else np.full(shape, gate)
  if write:
    arrays[write] = rng.choice([-1000.0, -50.0, 0.0, 3.0, 50.0], shape)
    if gate == 'mixed':
      arrays[write] = np.minimum(arrays[write], 3.0)
  arrays, ids = cast(arrays, np.float32), jnp.asarray(ids)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
  expected = OPS[name][1](**exact, segment_ids=np.asarray(ids))
  ones = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), expected)
  for form in FORMS:
    out, state, grads = vjp(
      arrays, ones, ids, name=name, form=form, chunk_size=CHUNK
    )
    assert_close((out, state), expected, 5e-6)
    chex.assert_tree_all_finite(grads)


def test_mlstm_output_does_not_overflow_where_exp_does():
  arrays, _ = make('mlstm')
  arrays = cast(arrays, jnp.float32)
  shifted = {**arrays, 'input_gate': arrays['input_gate'] + 500}
  del shifted['initial_state']
  out, (c, n, m) = apply(shifted, name='mlstm', form='chunkwise', chunk_size=4)
  # So far above 1, |n . q| is the only denominator: a shift cancels.
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), shifted)
  exact['input_gate'] = exact['input_gate'] - 300
  expected, _ = oracles.mlstm(**exact)
  # exp of what float32 keeps of gates around 500 is good to three digits.
  assert_close(out, expected, 1e-3)
  chex.assert_tree_all_finite(c)
  chex.assert_tree_all_finite(n)
  np.testing.assert_array_less(400, m)


@pytest.mark.parametrize('form', ['chunkwise', 'recurrent'])
def test_mlstm_adds_eps_to_the_denominator(form):
  arrays, _ = make('mlstm')
  expected = oracles.mlstm(**arrays, eps=0.3)
  assert np.abs(expected[0] - oracles.mlstm(**arrays)[0]).max() > 0.01
  arrays = cast(arrays, jnp.float32)
  found = mlstm(**arrays, form=form, chunk_size=CHUNK, eps=0.3)
  assert_close(found, expected, 5e-6)


def test_mlstm_with_queries_that_no_key_answers_is_zero():
  arrays, _ = make('mlstm')
  del arrays['initial_state']
  arrays['q'] = np.zeros_like(arrays['q'])
  arrays['input_gate'] = np.full_like(arrays['input_gate'], 500)
  arrays = cast(arrays, jnp.float32)
  for form in ('chunkwise', 'recurrent'):
    out, state = apply(arrays, name='mlstm', form=form, chunk_size=CHUNK)
    np.testing.assert_array_equal(out, 0)
    ones = jax.tree.map(jnp.ones_like, (out, state))
    *_, grads = vjp(arrays, ones, name='mlstm', form=form, chunk_size=CHUNK)
    chex.assert_tree_all_finite(grads)


@pytest.mark.in_turn
@every_op
def test_vmap_and_second_order(name):
  arrays, _ = make(name, 5)
  with jax.enable_x64(True):
    arrays = cast(arrays)

    def loss(v, form):
      out, _ = OPS[name][0](**(arrays | {'v': v}), form=form, chunk_size=4)
      return jnp.sum(jnp.sin(out))

    def curvature(v, form):
      slope = lambda v: jax.jvp(lambda v: loss(v, form), (v,), (v,))[1]  # noqa: E731
      return jax.grad(slope)(v)

    def compile(form, transform):
      call = transform(functools.partial(curvature, form=form))
      return jax.jit(call)

    stack = jnp.stack([arrays['v'], 2 * arrays['v']])
    one = compile('recurrent', lambda f: f)
    expected = jnp.stack([one(v) for v in stack])
    assert_close(compile('chunkwise', jax.vmap)(stack), expected, 1e-10)


@every_op
def test_wrong_calls(name):
  arrays, ids = make(name, 3)
  arrays = cast(arrays)
  op = inspect.unwrap(OPS[name][0])  # without the checks of annotations
  with pytest.raises(ValueError, match='q has shape'):
    op(**(arrays | {'q': arrays['q'][..., :-1]}))
  gate = EXTREME[name][0]
  with pytest.raises(ValueError, match=f'{gate} has shape'):
    op(**(arrays | {gate: arrays[gate][:, :-1]}))
  with pytest.raises(ValueError, match='positive value'):
    op(**(arrays | {gate: -arrays[gate]}))
  with pytest.raises(ValueError, match=r'initial_state\[1\] has shape'):
    first, second, *rest = arrays['initial_state']
    wrong = (first, second[:, :1], *rest)
    op(**(arrays | {'initial_state': wrong}))
  with pytest.raises(ValueError, match='segment_ids has shape'):
    op(**arrays, segment_ids=jnp.asarray(ids[:, :-1]))
  with pytest.raises(ValueError, match='form ='):
    op(**arrays, form='scan')
  with pytest.raises(ValueError, match='power of two'):
    op(**arrays, form='chunkwise', chunk_size=3)
  with pytest.raises(NotImplementedError, match='implementation'):
    op(**arrays, implementation='pallas_tpu')


def test_wrong_calls_of_one_op():
  arrays, _ = make('gated_slot_attention', 3)
  narrow = cast(arrays | {key: arrays[key][:, :, :1] for key in 'qk'})
  with pytest.raises(ValueError, match='repeat k and q'):
    inspect.unwrap(gated_slot_attention)(**narrow)
  arrays, _ = make('trapezoidal_scan', 3)
  with pytest.raises(ValueError, match='at most 2'):
    inspect.unwrap(trapezoidal_scan)(
      **cast(
        arrays
        | {'angles': np.zeros((BATCH, 3, HEADS, 3)), 'initial_state': None}
      )
    )
