"""Hard gates, large exponents and identities of the elementwise ops."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.diagonal_scan import diagonal_scan
from efficient_attn.ops.recurrent.selective_scan import selective_scan
from efficient_attn.ops.recurrent.slstm import slstm
from efficient_attn.ops.recurrent.wkv4 import wkv4
from tests.ops.elementwise_cases import (
  CHUNK,
  FORMS,
  assert_close,
  call,
  expected,
  make,
  to_jax,
)
from tests.optimized import optimized

LENGTH = 4 * CHUNK + 1


def gates(kind, shape):
  rng = np.random.default_rng(4)
  soft = -rng.exponential(0.1, shape)
  return {
    'zero': np.zeros(shape),
    'hard': np.full(shape, -1000.0),
    'infinite': np.full(shape, -np.inf),
    'mixture': rng.choice([0.0, -1e-6, -1.0, -1000.0, -np.inf], shape),
    'resets': np.where(rng.random(shape) < 0.3, -np.inf, soft),
  }[kind].astype(np.float32)


@pytest.mark.parametrize('kind', ['hard', 'infinite', 'mixture', 'resets'])
def test_hard_gates_are_exact(kind):
  arrays, _ = make('diagonal', LENGTH, dtype=np.float32)
  arrays['log_decay'] = gates(kind, arrays['x'].shape)
  with np.errstate(all='ignore'):
    wanted = expected('diagonal', arrays)

  for form in FORMS['diagonal']:

    @optimized
    def run(arrays, form=form):
      def loss(arrays):
        result = call('diagonal', arrays, form=form)
        return sum(jnp.sum(x) for x in jax.tree.leaves(result)), result

      return jax.grad(loss, has_aux=True)(arrays)

    grads, result = run(to_jax(arrays))
    assert_close(result, wanted, 1e-6)
    for grad in jax.tree.leaves(grads):
      chex.assert_tree_all_finite(grad)
    if kind in ('hard', 'infinite'):
      # Nothing passes such a gate.
      last = np.zeros(arrays['x'].shape, np.float32) + 1
      last[:, -1] += 1  # the state is the last output once more
      np.testing.assert_array_equal(grads['x'], last)
      np.testing.assert_array_equal(grads['initial_state'], 0)


def test_no_decay_is_a_sum():
  arrays, _ = make('diagonal', LENGTH, state=False)
  x = arrays['x']
  with jax.enable_x64(True):
    for form in FORMS['diagonal']:
      out, state = jax.jit(
        functools.partial(diagonal_scan, form=form, chunk_size=CHUNK)
      )(jnp.asarray(x), log_decay=jnp.zeros(x.shape[2:]))
      assert_close((out, state), (np.cumsum(x, 1), np.sum(x, 1)), 1e-13)


def test_one_state_of_mamba_is_a_diagonal_scan():
  rng = np.random.default_rng(0)
  x, dt = rng.standard_normal((2, 2, LENGTH, 2, 3))
  dt, A = np.exp(dt), -np.exp(rng.standard_normal((2, 3)))
  B, C = rng.standard_normal((2, 2, LENGTH, 1))
  with jax.enable_x64(True):
    x, dt, A, B, C = to_jax((x, dt, A, B, C))

    @jax.jit
    def run(x, dt, A, B, C):
      h, state = diagonal_scan(
        dt * B[..., None] * x, log_decay=dt * A, form='recurrent'
      )
      ours = selective_scan(
        x, dt, A[..., None], B, C, form='chunkwise', chunk_size=CHUNK
      )
      return ours, (h * C[..., None], state[..., None])

    assert_close(*run(x, dt, A, B, C), 1e-13)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_zero_order_hold_near_zero(dtype):
  # dt A from 0 to -50 across the switch of formulas; the loss is the weight
  # (exp(z) - 1) / z, whose derivative is known from its series.
  z = -np.concatenate([[0], np.logspace(-12, np.log10(50), 40)])
  with np.errstate(invalid='ignore'):
    slope = (np.exp(z) * (z - 1) + 1) / z**2
  terms = [(n + 1) / np.prod(np.arange(1.0, n + 3)) * z**n for n in range(12)]
  slope = np.where(z > -0.3, sum(terms), slope)

  with jax.enable_x64(dtype == 'float64'):
    ones = jnp.ones((1, 1, 1, len(z)), dtype)

    def weight(z):
      y, _ = selective_scan(
        ones,
        ones,
        z.astype(dtype)[None, :, None],
        ones[..., 0, :1],
        ones[..., 0, :1],
        discretization='zoh',
      )
      return jnp.sum(y), y

    grad, y = optimized(jax.grad(weight, has_aux=True))(jnp.asarray(z))
  eps = np.finfo(dtype).eps
  safe = np.where(z == 0, 1, z)
  wanted = np.where(z == 0, 1, np.expm1(safe) / safe)
  np.testing.assert_allclose(y[0, 0, 0], wanted, rtol=4 * eps)
  np.testing.assert_allclose(grad, slope, rtol=100 * eps)


def test_wkv4_without_decay_is_the_normalised_sum_of_exponentials():
  arrays, _ = make('wkv4', LENGTH, state=False)
  k, v = arrays['k'], arrays['v']
  zeros = np.zeros(k.shape[2:])
  weights = np.exp(k)
  wanted = np.cumsum(weights * v, 1) / np.cumsum(weights, 1)
  with jax.enable_x64(True):
    for form in FORMS['wkv4']:
      out, _ = jax.jit(functools.partial(wkv4, form=form, chunk_size=CHUNK))(
        *to_jax((k, v)), log_decay=jnp.asarray(zeros), bonus=jnp.asarray(zeros)
      )
      assert_close(out, wanted, 1e-13)


@pytest.mark.parametrize('gate', [0.0, -0.5, -1000.0])
def test_wkv4_of_keys_up_to_200(gate):
  rng = np.random.default_rng(0)
  arrays, ids = make('wkv4', LENGTH, dtype=np.float32, state=False)
  arrays['k'] = rng.uniform(-200, 200, arrays['k'].shape).astype(np.float32)
  arrays['log_decay'] = np.full_like(arrays['log_decay'], gate)
  wanted, (above, below) = expected('wkv4', arrays, ids)
  for form in FORMS['wkv4']:

    @optimized
    def run(arrays, form=form):
      def loss(arrays):
        out, state = wkv4(
          **arrays, segment_ids=jnp.asarray(ids), form=form, chunk_size=CHUNK
        )
        return jnp.sum(out), (out, state)

      return jax.grad(loss, has_aux=True)(arrays)

    grads, (out, (num, den, top)) = run(to_jax(arrays))
    np.testing.assert_allclose(out, wanted, atol=1e-4)
    np.testing.assert_allclose(num / den, above / below, atol=1e-4)
    np.testing.assert_allclose(
      np.log(den) + top, np.log(below), rtol=1e-5, atol=1e-4
    )
    for grad in jax.tree.leaves(grads):
      chex.assert_tree_all_finite(grad)


def test_slstm_of_gates_up_to_200():
  rng = np.random.default_rng(0)
  arrays, ids = make('slstm', LENGTH, dtype=np.float32, state=False)
  for name in ('i', 'f'):
    arrays[name] = rng.uniform(-200, 200, arrays[name].shape)
    arrays[name] = arrays[name].astype(np.float32)
  wanted, _ = expected('slstm', arrays, ids)

  @optimized
  def run(arrays):
    def loss(arrays):
      out, _ = slstm(**arrays, segment_ids=jnp.asarray(ids))
      return jnp.sum(out), out

    return jax.grad(loss, has_aux=True)(arrays)

  grads, out = run(to_jax(arrays))
  np.testing.assert_allclose(out, wanted, atol=1e-3)
  for grad in jax.tree.leaves(grads):
    chex.assert_tree_all_finite(grad)


@pytest.mark.parametrize('name', sorted(set(FORMS) - {'bidirectional'}))
def test_bfloat16_tokens_float32_state(name):
  arrays, _ = make(name, LENGTH, dtype=np.float32, state=False)
  arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arrays)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
  for form in FORMS[name][:2]:
    out, state = optimized(functools.partial(call, name, form=form))(arrays)
    assert out.dtype == jnp.bfloat16
    wanted, memory = expected(name, exact)
    # One rounding of the output; sums and states are float32.
    np.testing.assert_allclose(out, wanted, rtol=2**-8, atol=1e-3)
    assert_close(state, memory, 1e-5)


def test_arguments_of_each_op():
  arrays = to_jax(make('diagonal', 3, dtype=np.float32)[0])
  op = inspect.unwrap(diagonal_scan)
  with pytest.raises(ValueError, match='positive value'):
    op(**{**arrays, 'log_decay': -arrays['log_decay']})
  with pytest.raises(ValueError, match='no first token'):
    op(**arrays, bidirectional=True)
  with pytest.raises(ValueError, match='power of two'):
    op(**arrays, chunk_size=3, form='chunkwise')
  arrays = to_jax(make('euler', 3, dtype=np.float32)[0])
  op = inspect.unwrap(selective_scan)
  with pytest.raises(ValueError, match='dt has the wrong sign.*softplus'):
    op(**{**arrays, 'dt': -arrays['dt']})
  with pytest.raises(ValueError, match='A has the wrong sign.*exp'):
    op(**{**arrays, 'A': -arrays['A']})
  with pytest.raises(ValueError, match='pass one of .*zoh'):
    op(**arrays, discretization='tustin')


def sizes(jaxpr):
  """Sizes of all results, those of inner jaxprs included."""
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars)
    for item in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda p: hasattr(p, 'jaxpr') or hasattr(p, 'eqns'),
    ):
      inner = getattr(item, 'jaxpr', item)
      if hasattr(inner, 'eqns'):
        yield from sizes(inner)


def test_memory_of_mamba_is_of_chunks_not_of_the_sequence():
  length, heads, channels, states, chunk = 4096, 2, 8, 64, 16
  shape = jax.ShapeDtypeStruct((1, length, heads, channels), 'float32')
  keys = jax.ShapeDtypeStruct((1, length, states), 'float32')
  A = jax.ShapeDtypeStruct((heads, channels, states), 'float32')

  def loss(*arrays):
    out, _ = selective_scan(*arrays, chunk_size=chunk, form='chunkwise')
    return jnp.sum(out)

  grad = jax.grad(loss, range(5))
  jaxpr = jax.make_jaxpr(grad)(shape, shape, A, keys, keys)
  state = heads * channels * states
  # A state (and A) per chunk, the inputs, the insides of one chunk.
  most = max(length // chunk * state, length * states, chunk * state)
  assert max(sizes(jaxpr.jaxpr)) <= most < length * state / 10
