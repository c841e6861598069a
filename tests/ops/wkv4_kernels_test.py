"""The kernel of wkv4, interpreted, compiled, and who may call it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.scan import wkv4 as kernel
from efficient_attn.ops.recurrent.wkv4 import explain_wkv4, wkv4
from tests.kernels.matrix_test import TOPOLOGIES, devices, races
from tests.ops.elementwise_cases import assert_close, plain, to_jax
from tests.optimized import optimized
from tests.oracles import elementwise as oracle

KERNEL = 'pallas_tpu'
HEADS, CHANNELS = 2, 72
# name: (length, with a state, with segments, scale of k); chunks are of 128.
FEATURES = {
  'state_segments': (140, True, True, 1),
  'short': (5, False, False, 1),
  'whole': (128, True, False, 1),
  'strong': (259, True, True, 18),
}


def make(length, state, segments, size, seed=0, batch=2):
  """Arrays and segment ids of a call; some gates are closed, some open."""
  rng = np.random.default_rng(seed)
  channels = (HEADS, CHANNELS)
  normal = rng.standard_normal
  arrays = {
    'k': size * normal((batch, length, *channels)),
    'v': normal((batch, length, *channels)),
    'log_decay': -rng.exponential(0.3, channels),
    'bonus': normal(channels),
  }
  arrays['log_decay'][0, :4] = 0, -1000, -30, -1e-3
  if state:
    first = [normal((batch, *channels)) for _ in range(3)]
    arrays['initial_state'] = first[0], np.exp(first[1]), first[2]
  ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) % 3
  arrays = jax.tree.map(np.float32, arrays)
  return arrays, ids.astype(np.int32) if segments else None


@functools.partial(jax.jit, static_argnames=('how',))
def vjp(arrays, cotangents, ids, how):
  def call(arrays):
    out, state = wkv4(**arrays, segment_ids=ids, **dict(how))
    return out, plain('wkv4', state)

  out, pull = jax.vjp(call, arrays)
  return *out, pull(cotangents)[0]


@pytest.mark.parametrize('feature', FEATURES)
def test_outputs_states_and_gradients(feature):
  arrays, ids = make(*FEATURES[feature])
  exact = jax.tree.map(np.float64, arrays)
  out, state = oracle.wkv4(**exact, segment_ids=ids)
  rng = np.random.default_rng(1)
  # The state of strong weights is as large as their exponentials.
  cotangents = jax.tree.map(
    lambda x: np.float32(rng.standard_normal(x.shape) / np.abs(x).max()),
    (out, state),
  )
  with jax.enable_x64(True):
    expected = vjp(
      exact, jax.tree.map(np.float64, cotangents), ids, (('form', 'recurrent'),)
    )
    expected = jax.tree.map(np.asarray, expected)
  assert_close(expected[0], out, 1e-12)
  found = vjp(arrays, cotangents, ids, (('implementation', KERNEL),))
  assert_close(found[0], out, 2e-6)
  # Exponentials of numbers of some tens, in float32.
  assert_close(found[2], expected[2], 2e-5)
  for x, y in zip(found[1], state, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def test_causality_is_bitwise():
  (arrays, ids), (other, others) = (
    make(140, False, True, 1, seed=seed) for seed in (0, 3)
  )

  @optimized
  def call(arrays, ids):
    return wkv4(**arrays, segment_ids=ids, implementation=KERNEL)[0]

  out = np.asarray(call(to_jax(arrays), ids))
  for cut in (1, 7, 100, 127, 128, 139):

    def splice(x, y, cut=cut):
      return np.concatenate([x[:, :cut], y[:, cut:]], 1)

    mixed = arrays | {x: splice(arrays[x], other[x]) for x in 'kv'}
    changed = call(to_jax(mixed), splice(ids, others))
    np.testing.assert_array_equal(changed[:, :cut], out[:, :cut], f'{cut}')


def test_a_nan_of_a_segment_that_is_over_stays_there():
  arrays, _ = make(140, True, False, 1, batch=1)
  ids = jnp.repeat(jnp.arange(2), jnp.array([100, 40]))[None]
  state = arrays['initial_state']
  cotangents = np.ones_like(arrays['k']), state[:2]
  how = (('implementation', KERNEL),)
  clean = vjp(to_jax(arrays), cotangents, ids, how)
  dirty = arrays | {x: arrays[x].copy() for x in 'kv'}
  for name in 'kv':
    dirty[name][:, 3] = np.nan
  dirty['initial_state'] = jax.tree.map(lambda x: x * np.nan, state)
  out, last, grads = vjp(to_jax(dirty), cotangents, ids, how)
  np.testing.assert_array_equal(out[:, 100:], clean[0][:, 100:])
  assert_close(last, clean[1], 0)
  for name in 'kv':
    np.testing.assert_array_equal(grads[name][:, 100:], clean[2][name][:, 100:])


def test_what_the_kernel_refuses_it_says():
  arrays = to_jax(make(5, False, False, 1)[0])
  message = "form = 'recurrent'"
  with pytest.raises(NotImplementedError, match=message):
    wkv4(**arrays, implementation=KERNEL, form='recurrent')

  def explain(n, h):
    x, w = (jax.ShapeDtypeStruct((*s, n, h), np.float32) for s in ((1, 8), ()))
    return explain_wkv4(x, x, log_decay=w, bonus=w)

  assert 'tpu: pallas_tpu' in explain(2, 64)
  assert 'N * H = 96' in explain(1, 96)


def test_no_races_and_nothing_uninitialised():
  """The interpreter that simulates a TPU's memories and copies."""
  interpret = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
  )
  rng = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  tokens, memory = (1, 3, 136, 128), (1, 3, 1, 128)
  k, v, d_out = (normal(*tokens) for _ in range(3))
  w, u = -jnp.abs(normal(*memory[1:])), normal(*memory[1:])
  starts = jnp.zeros((1, 136), bool).at[:, 70].set(True)
  first = normal(*memory), jnp.exp(normal(*memory)), normal(*memory)

  def run(interpret):
    out, last, states = kernel.forward(
      k, v, w, u, first, starts, save=True, interpret=interpret
    )
    return (
      out[:, :, :136],
      last,
      kernel.backward(
        k, v, w, u, starts, states, d_out, first[:2], interpret=interpret
      ),
    )

  assert_close(run(interpret), run(True), 1e-6)
  assert not races().races_found


@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize('heads, channels', [(6, 128), (6, 64)])
def test_compiles_for_tpus(heads, channels, topology):
  mesh = jax.sharding.Mesh(np.array(devices(topology)[:1]), ('chip',))
  leaf = functools.partial(
    jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, jax.P())
  )
  k = leaf((2, 300, heads, channels), jnp.bfloat16)
  w = leaf((heads, channels), jnp.float32)
  ids = leaf((2, 300), jnp.int32)

  def both(k, w, ids):
    def call(k, w):
      return wkv4(k, k, log_decay=w, bonus=w, segment_ids=ids)

    out, pull = jax.vjp(call, k, w)
    return out, pull(out)

  lowered = jax.jit(both).lower(k, w, ids)
  assert lowered.as_text().count('tpu_custom_call') == 2
  lowered.compile()
