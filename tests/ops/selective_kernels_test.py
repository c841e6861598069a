"""The kernel of selective_scan, interpreted, compiled, and who may call it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.scan import selective
from efficient_attn.ops.recurrent.selective_scan import (
  explain_selective_scan,
  selective_scan,
)
from tests.kernels.matrix_test import TOPOLOGIES, devices, races
from tests.ops.elementwise_cases import assert_close, to_jax
from tests.optimized import optimized
from tests.oracles import elementwise as oracle

KERNEL = 'pallas_tpu'
HEADS, CHANNELS, STATES = 2, 64, 8
# name: (length, with a state, with segments); chunks are of 128 tokens.
FEATURES = {
  'state_segments': (140, True, True),
  'short': (5, False, False),
  'chunks': (259, True, False),
}


def make(length, state, segments, seed=0, batch=2):
  """Arrays and segment ids of a call."""
  rng = np.random.default_rng(seed)
  tokens, channels = (batch, length, HEADS, CHANNELS), (HEADS, CHANNELS)
  arrays = {
    'x': rng.standard_normal(tokens),
    'dt': rng.exponential(0.5, tokens),
    'A': -rng.exponential(1.0, (*channels, STATES)),
    'B': rng.standard_normal((batch, length, STATES)),
    'C': rng.standard_normal((batch, length, STATES)),
    'D': rng.standard_normal(channels),
  }
  if state:
    arrays['initial_state'] = rng.standard_normal((batch, *channels, STATES))
  ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) % 3
  arrays = jax.tree.map(np.float32, arrays)
  return arrays, ids.astype(np.int32) if segments else None


@functools.partial(jax.jit, static_argnames=('how',))
def vjp(arrays, cotangents, ids, how):
  call = lambda a: selective_scan(**a, segment_ids=ids, **dict(how))  # noqa: E731
  out, pull = jax.vjp(call, arrays)
  return *out, pull(cotangents)[0]


@pytest.mark.parametrize('feature', FEATURES)
def test_outputs_states_and_gradients(feature):
  arrays, ids = make(*FEATURES[feature])
  exact = jax.tree.map(np.float64, arrays)
  wanted = oracle.selective_scan(**exact, segment_ids=ids)
  rng = np.random.default_rng(1)
  cotangents = tuple(np.float32(rng.standard_normal(x.shape)) for x in wanted)
  with jax.enable_x64(True):
    expected = vjp(
      exact, tuple(map(np.float64, cotangents)), ids, (('form', 'recurrent'),)
    )
    expected = jax.tree.map(np.asarray, expected)
  assert_close(expected[:2], wanted, 1e-12)
  found = vjp(arrays, cotangents, ids, (('implementation', KERNEL),))
  assert_close(found, expected, 2e-6)


def test_causality_is_bitwise():
  (arrays, ids), (other, others) = (make(140, False, True, s) for s in (0, 3))

  @optimized
  def call(arrays, ids):
    return selective_scan(**arrays, segment_ids=ids, implementation=KERNEL)[0]

  out = np.asarray(call(to_jax(arrays), ids))
  for cut in (1, 100, 127, 128, 139):

    def splice(name, x, y, cut=cut):
      if name in ('A', 'D'):
        return x
      return np.concatenate([x[:, :cut], y[:, cut:]], 1)

    mixed = {name: splice(name, x, other[name]) for name, x in arrays.items()}
    changed = call(to_jax(mixed), splice('ids', ids, others))
    np.testing.assert_array_equal(changed[:, :cut], out[:, :cut], f'{cut}')


def test_a_nan_of_a_segment_that_is_over_stays_there():
  arrays, _ = make(140, True, False, batch=1)
  ids = jnp.repeat(jnp.arange(2), jnp.array([100, 40]))[None]
  call = jax.jit(
    lambda a: selective_scan(**a, segment_ids=ids, implementation=KERNEL)
  )
  clean, last = call(to_jax(arrays))
  for name in ('x', 'initial_state'):
    dirty = dict(arrays)
    dirty[name] = arrays[name].copy()
    dirty[name][:, 3 if name == 'x' else 0] = np.nan
    out, state = call(to_jax(dirty))
    np.testing.assert_array_equal(out[:, 100:], clean[:, 100:])
    np.testing.assert_array_equal(state, last)


REFUSED = {
  'discretization': (dict(discretization='zoh'), "discretization = 'zoh'"),
  'form': (dict(form='recurrent'), "form = 'recurrent'"),
  'chunk': (dict(chunk_size=256), 'chunk_size = 256'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_the_kernel_refuses_it_says(name):
  options, message = REFUSED[name]
  arrays = to_jax(make(5, False, False)[0])
  with pytest.raises(NotImplementedError, match=message):
    selective_scan(**arrays, implementation=KERNEL, **options)
  selective_scan(**arrays, implementation=(KERNEL, 'xla'), **options)


def test_shapes_that_the_kernel_refuses():
  shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731

  def explain(t, n, h, s):
    x = shape(1, t, n, h)
    return explain_selective_scan(x, x, shape(n, h, s))

  assert 'tpu: pallas_tpu' in explain(8, 2, 64, 16)
  assert 'T = 1' in explain(1, 2, 64, 16)
  assert 'N * H = 96' in explain(8, 1, 96, 16)
  assert 'S = 12' in explain(8, 2, 64, 12)


@pytest.mark.in_turn
def test_no_races_and_nothing_uninitialised():
  """The interpreter that simulates a TPU's memories and copies."""
  interpret = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
  )
  rng = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  tokens, memory = (1, 136, 128), (1, 8, 128)
  x, dt, d_y = normal(*tokens), jnp.abs(normal(*tokens)), normal(*tokens)
  arrays = x, dt, -jnp.abs(normal(8, 128)), normal(1, 136, 8), normal(1, 136, 8)
  starts = jnp.zeros((1, 136), bool).at[:, 70].set(True)
  first, d_last = normal(*memory), normal(*memory)

  def run(interpret):
    y, last, states = selective.forward(
      *arrays, first, starts, dtype=x.dtype, save=True, interpret=interpret
    )
    return (
      y,
      last,
      *selective.backward(
        *arrays, starts, states, d_y, d_last, interpret=interpret
      ),
    )

  assert_close(run(interpret), run(True), 1e-6)
  assert not races().races_found


@pytest.mark.parametrize(
  'length, channels, states, topology',
  [
    pytest.param(256, 256, 16, topology, marks=pytest.mark.in_turn)
    for topology in TOPOLOGIES
  ]
  + [pytest.param(300, 384, 8, 'v5e:2x2', marks=pytest.mark.in_turn)],
)
def test_compiles_for_tpus(length, channels, states, topology):
  mesh = jax.sharding.Mesh(np.array(devices(topology)[:1]), ('chip',))
  leaf = functools.partial(
    jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, jax.P())
  )
  x = leaf((1, length, 1, channels), jnp.bfloat16)
  A = leaf((1, channels, states), jnp.float32)
  b = leaf((1, length, states), jnp.bfloat16)
  ids = leaf((1, length), jnp.int32)

  def both(*args):
    call = lambda *xs: selective_scan(*xs, segment_ids=args[-1])  # noqa: E731
    out, pull = jax.vjp(call, *args[:-1])
    return out, pull(out)

  lowered = jax.jit(both).lower(x, x, A, b, b, ids)
  assert lowered.as_text().count('tpu_custom_call') == 2
  lowered.compile()
