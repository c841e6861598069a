"""The kernel of diagonal_scan, interpreted, compiled, and who may call it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.scan import diagonal
from efficient_attn.ops.recurrent.diagonal_scan import (
  diagonal_scan,
  explain_diagonal_scan,
)
from tests.kernels.matrix_test import TOPOLOGIES, devices, races
from tests.ops.elementwise_cases import assert_close, to_jax
from tests.optimized import optimized
from tests.oracles import elementwise as oracle

KERNEL = 'pallas_tpu'
HEADS, CHANNELS = 2, 64
GATES = [0.0, -np.inf, -1000.0, -0.01, -3.0, -50.0]
# name: (length, gate, with a state, options); chunks are of 128 tokens.
FEATURES = {
  'state_segments': (140, 'token', True, {'segments': True}),
  'short': (5, 'token', False, {}),
  'constant': (259, 'constant', True, {'channels': 72, 'segments': True}),
  'hard': (259, 'hard', True, {'channels': 128}),
  'wide': (37, 'constant', True, {'channels': 128, 'segments': True}),
  'bidirectional': (37, 'token', False, {'bidirectional': True}),
}


def make(
  length, gate, state, segments=False, channels=CHANNELS, seed=0, batch=2
):
  """Arrays and segment ids of a call."""
  rng = np.random.default_rng(seed)
  channels = (HEADS, channels)
  tokens = (batch, length, *channels)
  arrays = {
    'x': rng.standard_normal(tokens),
    'log_decay': rng.choice(GATES, tokens)
    if gate == 'hard'
    else -rng.exponential(0.3, channels if gate == 'constant' else tokens),
  }
  if state:
    arrays['initial_state'] = rng.standard_normal((batch, *channels))
  ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) % 3
  arrays = jax.tree.map(np.float32, arrays)
  return arrays, ids.astype(np.int32) if segments else None


@functools.partial(jax.jit, static_argnames=('how',))
def vjp(arrays, cotangents, ids, how):
  call = lambda a: diagonal_scan(**a, segment_ids=ids, **dict(how))  # noqa: E731
  out, pull = jax.vjp(call, arrays)
  return *out, pull(cotangents)[0]


@pytest.mark.parametrize('feature', FEATURES)
def test_outputs_states_and_gradients(feature):
  length, gate, state, options = FEATURES[feature]
  both = options.get('bidirectional', False)
  sizes = {k: v for k, v in options.items() if k != 'bidirectional'}
  arrays, ids = make(length, gate, state, **sizes)
  options = {'bidirectional': both}
  exact = jax.tree.map(np.float64, arrays)
  wanted = oracle.diagonal_scan(**exact, segment_ids=ids, **options)
  rng = np.random.default_rng(1)
  cotangents = jax.tree.map(
    lambda x: np.float32(rng.standard_normal(x.shape)), wanted
  )
  options = tuple(options.items())
  with jax.enable_x64(True):
    expected = vjp(
      exact,
      jax.tree.map(np.float64, cotangents),
      ids,
      (('form', 'recurrent'), *options),
    )
    expected = jax.tree.map(np.asarray, expected)
  assert_close(expected[:2], wanted, 1e-12)
  found = vjp(arrays, cotangents, ids, (('implementation', KERNEL), *options))
  assert_close(found, expected, 2e-6)


def test_bfloat16_is_rounded_once():
  arrays, _ = make(140, 'token', True)
  arrays['x'] = np.asarray(jnp.asarray(arrays['x'], jnp.bfloat16))
  h, state = diagonal_scan(**to_jax(arrays), implementation=KERNEL)
  exact, last = oracle.diagonal_scan(**jax.tree.map(np.float64, arrays))
  assert h.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(h), exact, rtol=2**-8, atol=1e-5)
  assert_close(state, last, 2e-6)


def test_causality_is_bitwise():
  (arrays, ids), (other, others) = (
    make(140, 'token', False, True, seed=seed) for seed in (0, 3)
  )

  @optimized
  def call(arrays, ids):
    return diagonal_scan(**arrays, segment_ids=ids, implementation=KERNEL)[0]

  out = np.asarray(call(to_jax(arrays), ids))
  for cut in (1, 7, 100, 127, 128, 139):

    def splice(x, y, cut=cut):
      return np.concatenate([x[:, :cut], y[:, cut:]], 1)

    changed = call(
      to_jax(jax.tree.map(splice, arrays, other)), splice(ids, others)
    )
    np.testing.assert_array_equal(changed[:, :cut], out[:, :cut], f'{cut}')


def test_a_nan_of_a_segment_that_is_over_stays_there():
  arrays, _ = make(140, 'token', True, batch=1)
  ids = jnp.repeat(jnp.arange(2), jnp.array([100, 40]))[None]
  cotangents = np.ones_like(arrays['x']), arrays['initial_state']
  how = (('implementation', KERNEL),)
  clean = vjp(to_jax(arrays), cotangents, ids, how)
  for name in ('x', 'initial_state'):
    dirty = dict(arrays)
    dirty[name] = arrays[name].copy()
    dirty[name][:, 3 if name == 'x' else 0] = np.nan
    h, state, grads = vjp(to_jax(dirty), cotangents, ids, how)
    np.testing.assert_array_equal(h[:, 100:], clean[0][:, 100:])
    np.testing.assert_array_equal(state, clean[1])
    for key in ('x', 'log_decay'):
      np.testing.assert_array_equal(grads[key][:, 100:], clean[2][key][:, 100:])


def test_what_the_kernel_refuses_it_says():
  arrays = to_jax(make(5, 'token', False)[0])
  for options, message in (
    (dict(form='recurrent'), "form = 'recurrent'"),
    (dict(chunk_size=256), 'chunk_size = 256'),
  ):
    with pytest.raises(NotImplementedError, match=message):
      diagonal_scan(**arrays, implementation=KERNEL, **options)
    diagonal_scan(**arrays, implementation=(KERNEL, 'xla'), **options)

  def explain(t, n, h):
    x = jax.ShapeDtypeStruct((1, t, n, h), np.float32)
    return explain_diagonal_scan(x, log_decay=x)

  assert 'tpu: pallas_tpu' in explain(8, 2, 64)
  assert 'T = 1' in explain(1, 2, 64)
  assert 'N * H = 96' in explain(8, 1, 96)


def test_no_races_and_nothing_uninitialised():
  """The interpreter that simulates a TPU's memories and copies."""
  interpret = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
  )
  rng = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  tokens, memory = (1, 3, 136, 128), (1, 3, 1, 128)
  arrays = normal(*tokens), -jnp.abs(normal(*tokens))
  starts = jnp.zeros((1, 136), bool).at[:, 70].set(True)
  first, d_last, d_h = normal(*memory), normal(*memory), normal(*tokens)

  def run(interpret):
    h, last, states = diagonal.forward(
      *arrays, first, starts, dtype=d_h.dtype, save=True, interpret=interpret
    )
    return (
      h,
      last,
      *diagonal.backward(
        *arrays, starts, states, d_h, d_last, interpret=interpret
      ),
    )

  assert_close(run(interpret), run(True), 1e-6)
  assert not races().races_found


@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize(
  'gate, heads, channels', [('token', 6, 128), ('constant', 6, 64)]
)
def test_compiles_for_tpus(gate, heads, channels, topology):
  mesh = jax.sharding.Mesh(np.array(devices(topology)[:1]), ('chip',))
  leaf = functools.partial(
    jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, jax.P())
  )
  x = leaf((2, 300, heads, channels), jnp.bfloat16)
  log_decay = leaf(x.shape[2 * (gate == 'constant') :], jnp.float32)
  ids = leaf((2, 300), jnp.int32)

  def both(x, log_decay, ids):
    call = lambda x, g: diagonal_scan(x, log_decay=g, segment_ids=ids)  # noqa: E731
    out, pull = jax.vjp(call, x, log_decay)
    return out, pull(out)

  lowered = jax.jit(both).lower(x, log_decay, ids)
  assert lowered.as_text().count('tpu_custom_call') == 2
  lowered.compile()
