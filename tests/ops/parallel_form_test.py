"""Many chunks at once, as accelerators run them, against the recurrences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent import chunk_states, gates
from efficient_attn.ops.recurrent import linear_attention as recurrence
from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from tests.ops import delta_rule_cases as delta
from tests.ops import gated_recurrences_test as gated
from tests.ops import linear_attention_cases as linear
from tests.ops import log_linear_test as log_linear
from tests.ops import mesa_test as mesa
from tests.ops.linear_attention_cases import assert_close, to_jax
from tests.optimized import optimized

CHUNK, LENGTH = 4, 21  # six chunks, the last one with three tokens missing
PARALLEL = 'xla_parallel'


def of_linear(gate, **options):
  def make():
    arrays, given = linear.make(
      gate, LENGTH, state=True, segments=True, options=options
    )
    return arrays, given.pop('segment_ids')

  return functools.partial(linear_attention, **options), make


def of_delta(op, gate):
  def make():
    return delta.make(op, gate, LENGTH), delta.segments(LENGTH)

  return delta.OPS[op], make


def of_gated(name):
  return gated.OPS[name][0], lambda: gated.make(name, LENGTH)


def of_log_linear():
  def op(**arguments):
    out, (memory, _) = log_linear.log_linear_attention(**arguments)
    return out, memory

  def make():
    return log_linear.make(LENGTH), log_linear.make_ids(LENGTH)

  return op, make


def of_mesa():
  def make():
    return mesa.make(LENGTH), mesa.make_ids(LENGTH)

  return mesa.mesa_recurrence, make


OPS = {
  'linear': of_linear('none', normalize=True),
  'linear_scalar': of_linear('scalar', read='exclusive'),
  'linear_channel': of_linear('channel'),
  'delta': of_delta('delta', 'scalar'),
  'erase': of_delta('erase', 'channel'),
  'dplr': of_delta('dplr', 'channel'),
  'mlstm': of_gated('mlstm'),
  'slots': of_gated('gated_slot_attention'),
  'log_linear': of_log_linear(),
  'mesa': of_mesa(),
}


@pytest.mark.parametrize('segments', [True, False])
@pytest.mark.parametrize('name', OPS)
def test_equals_the_recurrence(name, segments, monkeypatch):
  # Two groups of three chunks.
  monkeypatch.setattr(chunk_states, '_group', lambda *_: 3)
  op, make = OPS[name]
  arrays, ids = make()
  ids = jnp.asarray(ids) if segments else None

  def run(arrays, cotangents, **how):
    def call(arrays):
      return op(**arrays, segment_ids=ids, chunk_size=CHUNK, **how)

    result, pull = jax.vjp(call, arrays)
    if cotangents is None:
      rng = np.random.default_rng(0)
      cotangents = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape)), result
      )
    return result, pull(cotangents)[0], cotangents

  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    *expected, cotangents = jax.jit(functools.partial(run, form='recurrent'))(
      arrays, None
    )
    found = jax.jit(
      functools.partial(run, form='chunkwise', implementation=PARALLEL)
    )(arrays, cotangents)
    assert_close(found[:2], expected, 1e-9)


BITWISE = {
  'scalar': lambda: linear.make('scalar', 37, dtype=np.float32)[0],
  'channel': lambda: linear.make('channel', 37, dtype=np.float32)[0],
  'delta': lambda: jax.tree.map(
    np.float32, delta.make('delta', 'channel', 37, state=False)
  ),
}


@pytest.mark.parametrize('name', BITWISE)
def test_causality_is_bitwise(name):
  arrays = BITWISE[name]()
  op = delta_rule if name == 'delta' else linear_attention
  call = optimized(
    lambda arrays: op(
      **arrays, form='chunkwise', chunk_size=16, implementation=PARALLEL
    )[0]
  )
  out = np.asarray(call(to_jax(arrays)))
  for cut in (1, 7, 15, 16, 31):
    changed = jax.tree.map(np.copy, arrays)
    for x in changed.values():
      x[:, cut:] = 1000 * x[:, cut - 1 :: -1][:, :1]
    changed = np.asarray(call(to_jax(changed)))
    np.testing.assert_array_equal(changed[:, :cut], out[:, :cut], f'{cut}')
    assert np.any(changed[:, cut:] != out[:, cut:])


@pytest.mark.parametrize('gate', ['scalar', 'channel'])
def test_hard_gates_are_resets(gate):
  arrays, options = linear.make(
    gate, LENGTH, state=True, segments=True, dtype=np.float32
  )
  rng = np.random.default_rng(1)
  hard = rng.random(arrays['log_decay'].shape)
  arrays['log_decay'] = np.where(
    hard < 0.2, -1000, np.where(hard < 0.3, -np.inf, arrays['log_decay'])
  )
  arrays = to_jax(jax.tree.map(np.float32, arrays))
  options = to_jax(options)

  def grads(arrays, **how):
    def loss(arrays):
      out, state = linear_attention(
        **arrays, **options, chunk_size=CHUNK, **how
      )
      return jnp.sum(out**2) + jnp.sum(state**2)

    return jax.value_and_grad(loss)(arrays)

  found = jax.jit(functools.partial(grads, implementation=PARALLEL))(arrays)
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda x: x.astype(np.float64), arrays)
    expected = jax.jit(functools.partial(grads, form='recurrent'))(exact)
    expected = jax.tree.map(np.asarray, expected)
  assert_close(found, expected, 5e-6)


def test_infinite_forget_gates_of_mlstm():
  arrays, ids = gated.make('mlstm', LENGTH)
  arrays['log_forget'][:, ::5] = -np.inf
  arrays['log_forget'][:, 3] = -1e5
  arrays['input_gate'][:, 2] = 2e4
  with jax.enable_x64(True):
    call = functools.partial(
      gated.mlstm, **to_jax(arrays), segment_ids=jnp.asarray(ids)
    )
    found = call(form='chunkwise', chunk_size=CHUNK, implementation=PARALLEL)
    assert_close(found, call(form='recurrent'), 1e-9)


def test_the_platform_and_its_memory_choose():
  arrays = linear.make('scalar', 2048, batch=1, dtype=np.float32)[0]
  arrays = to_jax(arrays)

  @jax.jit
  def gradient(arrays):
    loss = lambda a: jnp.sum(linear_attention(**a)[0])  # noqa: E731
    return jax.grad(loss)(arrays)

  def products(platform):
    """The first axes of the matrix products of a program."""
    text = (
      gradient.trace(arrays).lower(lowering_platforms=(platform,)).as_text()
    )
    lines = [line for line in text.split('\n') if 'dot_general' in line]
    return {int(line.split('-> tensor<')[1].split('x')[0]) for line in lines}

  # Products over one chunk of the only row, or over all 16 chunks.
  assert products('cpu') == {1}
  for platform in ('tpu', 'cuda', 'rocm'):
    assert 16 in products(platform)

  q, k, v, gate = (
    jax.ShapeDtypeStruct((1, 32768, *rest), jnp.bfloat16)
    for rest in ((16, 1, 128), (16, 1, 128), (16, 1, 128), (16, 1, 1))
  )
  state = jax.ShapeDtypeStruct((1, 16, 1, 128, 128), jnp.float32)
  group = chunk_states._group(
    recurrence.CHUNK[True], 128, ([q, k], [v], gate), state
  )
  assert 1 < group < 32768 // 128


@pytest.mark.parametrize('inclusive', [True, False])
def test_sums_by_products_equal_those_by_doubling(inclusive):
  gate = -np.random.default_rng(0).exponential(1, (2, 16, 3))
  with jax.enable_x64(True):
    q, k = jnp.ones_like(gate), jnp.ones_like(gate)
    for function, arrays in (
      (gates.decayed_scores, (q, k, jnp.asarray(gate))),
      (gates.span_sums, (jnp.asarray(gate[..., 0]),)),
    ):
      found, expected = (
        function(*arrays, inclusive=inclusive, wide=wide)
        for wide in (True, False)
      )
      assert_close(found, expected, 1e-13)
