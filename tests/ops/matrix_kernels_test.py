"""Kernels of recurrences of matrices, interpreted, and who may call them."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.delta_rule import (
  delta_rule,
  explain_delta_rule,
)
from efficient_attn.ops.recurrent.dplr import dplr, explain_dplr
from efficient_attn.ops.recurrent.linear_attention import (
  explain_linear_attention,
  linear_attention,
)
from tests.ops import linear_attention_cases
from tests.ops.linear_attention_cases import assert_close, to_jax
from tests.optimized import optimized
from tests.oracles import delta_rule as delta_oracle
from tests.oracles import linear_attention as linear_oracle

SIZES = dict(batch=2, heads=4, channels=16, values=24)
KERNEL = 'pallas_tpu'
OPS = {
  'linear': linear_attention,
  'delta': delta_rule,
  'erase': delta_rule,
  'dplr': dplr,
}
ORACLES = {
  'linear': linear_oracle.linear_attention,
  'delta': delta_oracle.delta_rule,
  'erase': delta_oracle.delta_rule,
  'dplr': delta_oracle.dplr,
}
# One for each kernel.
GATES = [
  ('linear', 'scalar'),
  ('linear', 'channel'),
  ('delta', 'scalar'),
  ('delta', 'channel'),
  ('dplr', 'channel'),
]

# name: (length, kv heads, with a state, with segments, options); chunks are of
# 128 tokens.
FEATURES = {
  'short': (5, 4, False, False, {}),
  'chunk': (128, 4, True, False, {'scale': -0.3}),
  'grouped': (131, 2, True, True, {}),
  'one_key_head': (259, 1, True, True, {'form': 'chunkwise'}),
  'normalize': (130, 2, True, True, {'normalize': True}),
  'bidirectional': (130, 2, False, True, {'bidirectional': True}),
  'exclusive': (131, 2, True, True, {'read': 'exclusive'}),
}


def make(op, gate, length, **sizes):
  """Arrays and options of a call; what is written has the length 1 or less."""
  arrays, options = linear_attention_cases.make(gate, length, **sizes)
  if op == 'linear':
    return arrays, options
  arrays.pop('bonus', None)
  rng, k = np.random.default_rng(7), arrays['k']
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  arrays['k'] = unit(k)
  shape = arrays['v'].shape[:-1]
  if op == 'dplr':
    a = unit(rng.standard_normal(k.shape))
    b = rng.uniform(0, 2, (*k.shape[:-1], 1)) * unit(
      a + 0.2 * rng.standard_normal(k.shape)
    )
    new = {'a': a, 'b': -b}
  else:
    new = {'beta': rng.uniform(0, 2, shape)}
    if op == 'erase':
      new['erase'] = rng.uniform(0, 1, (*shape, k.shape[-1]))
  arrays |= {name: x.astype(k.dtype) for name, x in new.items()}
  return arrays, options


@functools.partial(jax.jit, static_argnums=0)
def _vjp(call, arrays, cotangents):
  out, pull = jax.vjp(call, arrays)
  return *out, pull(cotangents)[0]


def vjp(op, arrays, cotangents, options, **how):
  """The output, the state and the gradient of every array."""
  options = ids_to_jax(options)
  call = lambda arrays: OPS[op](**arrays, **options, **how)  # noqa: E731
  return _vjp(call, to_jax(arrays), to_jax(cotangents))


def ids_to_jax(options):
  ids = options.get('segment_ids')
  return options if ids is None else options | {'segment_ids': jnp.asarray(ids)}


def case(op, gate, feature, dtype=np.float32, seed=0, change=None):
  """Arrays, cotangents, options and what float64 gives for these arrays."""
  length, kv_heads, state, segments, options = FEATURES[feature]
  options = dict(options)
  form = options.pop('form', None)
  arrays, options = make(
    op,
    gate,
    length,
    kv_heads=kv_heads,
    state=state,
    segments=segments,
    options=options,
    seed=seed,
    **SIZES,
  )
  if change is not None:
    change(arrays)
  rng = np.random.default_rng(1)
  cotangents = jax.tree.map(
    lambda x: rng.standard_normal(x.shape), ORACLES[op](**arrays, **options)
  )
  low = {'q', 'k', 'v', 'a', 'b'}
  cast = lambda name, x: np.asarray(  # noqa: E731
    jnp.asarray(x, dtype if name in low else np.float32)
  )
  arrays = {
    name: jax.tree.map(functools.partial(cast, name), x)
    for name, x in arrays.items()
  }
  cotangents = (
    cast('v', cotangents[0]),
    jax.tree.map(np.float32, cotangents[1]),
  )
  exact = jax.tree.map(np.float64, (arrays, cotangents))
  out, state = ORACLES[op](**exact[0], **options)
  with jax.enable_x64(True):
    found = vjp(op, *exact, options, form='recurrent')
    found = jax.tree.map(np.asarray, found)
  assert_close(found[:2], (out, state), 1e-12)
  return arrays, cotangents, options | {'form': form}, found


def errors(found, expected):
  return [
    np.abs(np.asarray(x).astype(np.float64) - y).max() / max(1, np.abs(y).max())
    for x, y in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    )
  ]


CASES = [
  ('linear', 'scalar', 'grouped'),
  ('linear', 'none', 'short'),
  ('linear', 'constant', 'chunk'),
  ('linear', 'scalar', 'one_key_head'),
  ('linear', 'scalar', 'normalize'),
  ('linear', 'constant', 'bidirectional'),
  ('linear', 'channel', 'grouped'),
  ('linear', 'channel', 'chunk'),
  ('linear', 'channel', 'one_key_head'),
  ('linear', 'channel', 'exclusive'),
  ('delta', 'scalar', 'grouped'),
  ('delta', 'none', 'short'),
  ('delta', 'scalar', 'chunk'),
  ('delta', 'constant', 'short'),
  ('delta', 'scalar', 'one_key_head'),
  ('delta', 'scalar', 'bidirectional'),
  ('delta', 'channel', 'grouped'),
  ('delta', 'channel', 'chunk'),
  ('delta', 'channel', 'one_key_head'),
  ('erase', 'channel', 'exclusive'),
  ('dplr', 'channel', 'grouped'),
  *(
    pytest.param(*case, marks=pytest.mark.in_turn)
    for case in (
      ('erase', 'scalar', 'grouped'),
      ('dplr', 'channel', 'one_key_head'),
      ('dplr', 'channel', 'exclusive'),
    )
  ),
]


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
@pytest.mark.parametrize('op, gate, feature', CASES)
def test_outputs_states_and_gradients(op, gate, feature, dtype):
  arrays, cotangents, options, expected = case(op, gate, feature, dtype)
  found = vjp(op, arrays, cotangents, options, implementation=KERNEL)
  plain = vjp(op, arrays, cotangents, options, implementation='xla')
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
    assert x.shape == y.shape and x.dtype == y.dtype
  floor = 1e-6 if dtype == np.float32 else 2e-3
  for error, of_plain in zip(
    errors(found, expected), errors(plain, expected), strict=True
  ):
    assert error <= 2 * of_plain + floor


def hard(arrays):
  shape = arrays['log_decay'].shape
  arrays['log_decay'] = np.random.default_rng(1).choice(
    [0.0, -np.inf, -1000.0, -0.01, -50.0, -61.0, -59.0],
    shape,
    p=[0.3, 0.02, 0.05, 0.3, 0.23, 0.05, 0.05],
  )


@pytest.mark.parametrize('op, gate', [('linear', 'constant'), *GATES])
def test_hard_and_strong_gates(op, gate):
  arrays, cotangents, options, expected = case(op, gate, 'grouped', change=hard)
  found = vjp(op, arrays, cotangents, options, implementation=KERNEL)
  assert max(errors(found, expected)) < 2e-6


def run(op, arrays, options=(), **how):
  call = lambda a: OPS[op](**a, **ids_to_jax(dict(options)), **how)  # noqa: E731
  return jax.jit(call)(to_jax(arrays))


@pytest.mark.parametrize('op, gate', GATES)
def test_causality_is_bitwise(op, gate):
  sizes = dict(length=259, segments=True, dtype=np.float32, **SIZES)
  (arrays, options), (other, others) = (
    make(op, gate, seed=seed, **sizes) for seed in (0, 3)
  )

  @optimized
  def call(arrays, ids):
    return OPS[op](**arrays, segment_ids=ids, implementation=KERNEL)[0]

  out = np.asarray(call(to_jax(arrays), options['segment_ids']))
  for cut in (1, 100, 127, 128, 129, 258):

    def splice(x, y, cut=cut):
      return np.concatenate([x[:, :cut], y[:, cut:]], 1)

    changed = call(
      to_jax(jax.tree.map(splice, arrays, other)),
      splice(options['segment_ids'], others['segment_ids']),
    )
    np.testing.assert_array_equal(changed[:, :cut], out[:, :cut], f'{cut}')


@pytest.mark.parametrize('op, gate', GATES)
def test_packed_equals_separate(op, gate):
  lengths = (100, 28, 1, 90)
  ids = np.repeat([4, 1, 2, 4], lengths)[None].astype(np.int32)
  arrays, _ = make(
    op, gate, sum(lengths), dtype=np.float32, **SIZES | {'batch': 1}
  )
  out, state = run(op, arrays, dict(segment_ids=ids), implementation=KERNEL)
  start = 0
  for length in lengths:
    part = {name: x[:, start : start + length] for name, x in arrays.items()}
    own, last = ORACLES[op](**part)
    assert_close(out[:, start : start + length], own, 1e-6)
    start += length
  assert_close(state, last, 1e-6)


@pytest.mark.parametrize('op, gate', GATES)
def test_a_nan_of_a_segment_that_is_over_stays_there(op, gate):
  # The triangular system of a chunk takes it to all tokens of the chunk.
  end = 100 if op == 'linear' else 128
  ids = np.repeat([0, 1], [end, 259 - end])[None].astype(np.int32)
  arrays, _ = make(op, gate, 259, dtype=np.float32, **SIZES | {'batch': 1})
  clean, last = run(op, arrays, dict(segment_ids=ids), implementation=KERNEL)
  for name in ('v', 'initial_state')[gate == 'channel' :]:
    dirty = dict(arrays)
    if name == 'v':
      dirty['v'] = arrays['v'].copy()
      dirty['v'][:, 3] = np.nan
    else:
      dirty[name] = np.full((1, 4, 16, 24), np.nan, np.float32)
    out, state = run(op, dirty, dict(segment_ids=ids), implementation=KERNEL)
    np.testing.assert_array_equal(out[:, 128:], clean[:, 128:])
    np.testing.assert_array_equal(state, last)


@pytest.mark.parametrize('op, gate', GATES)
def test_state_continues_at_a_cut(op, gate):
  arrays, _ = make(op, gate, 259, state=True, dtype=np.float32, **SIZES)
  expected = ORACLES[op](**arrays)
  state = arrays.pop('initial_state')
  outs = []
  for span in (slice(0, 100), slice(100, 259)):
    part = {name: x[:, span] for name, x in arrays.items()}
    out, state = run(
      op, {**part, 'initial_state': state}, implementation=KERNEL
    )
    outs.append(out)
  assert_close((np.concatenate(outs, 1), state), expected, 1e-6)


@pytest.mark.parametrize('op, gate', GATES)
def test_vmap_equals_a_loop(op, gate):
  arrays, _ = make(op, gate, 130, dtype=np.float32, **SIZES | {'batch': 3})
  arrays = to_jax(arrays)
  row = lambda a: OPS[op](  # noqa: E731
    **jax.tree.map(lambda x: x[None], a), implementation=KERNEL
  )[0][0]
  loss = lambda a: jnp.sum(jnp.sin(row(a)))  # noqa: E731
  found = jax.jit(jax.vmap(jax.value_and_grad(loss)))(arrays)
  whole = lambda a: jax.vmap(loss)(a)  # noqa: E731
  again = jax.jit(lambda a: jax.vjp(whole, a)[1](jnp.ones(3))[0])(arrays)
  assert_close(found[1], again, 1e-6)
  out, _ = run(op, arrays, implementation='xla')
  assert_close(found[0], jnp.sum(jnp.sin(out), (1, 2, 3)), 1e-5)


def test_without_a_name_a_cpu_runs_the_plain_form():
  arrays, _ = make('linear', 'scalar', 37, dtype=np.float32, **SIZES)
  for x, y in zip(
    jax.tree.leaves(run('linear', arrays)),
    jax.tree.leaves(run('linear', arrays, implementation='xla')),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def test_chunks_within_a_span_of_saved_states():
  """The plain form's own backward pass, for every chunk size."""
  arrays, cotangents, options, expected = case('linear', 'scalar', 'grouped')
  for chunk_size in (16, 64, 128):
    found = vjp('linear', arrays, cotangents, options, chunk_size=chunk_size)
    assert max(errors(found, expected)) < 2e-6


REFUSED = {
  'form': (dict(form='recurrent'), "form = 'recurrent'"),
  'chunk': (dict(chunk_size=256), 'chunk_size = 256'),
  'read': (dict(read='exclusive'), "read = 'exclusive'"),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_a_kernel_refuses_it_says(name):
  options, message = REFUSED[name]
  arrays = to_jax(make('linear', 'scalar', 5, dtype=np.float32, **SIZES)[0])
  with pytest.raises(NotImplementedError, match=message):
    linear_attention(**arrays, implementation=KERNEL, **options)
  linear_attention(**arrays, implementation=(KERNEL, 'xla'), **options)
  assert explain_linear_attention(**arrays, **options).startswith(
    f'cpu: xla; tpu: xla; cuda: xla; rocm: xla; not {KERNEL}: {message}'
  )


def test_sizes_and_dtypes_that_a_kernel_refuses():
  shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
  explain = lambda t, h, v, **o: explain_linear_attention(  # noqa: E731
    shape(1, t, 2, h), shape(1, t, 2, h), shape(1, t, 2, v), **o
  )
  assert 'tpu: pallas_tpu' in explain(8, 64, 128)
  assert 'T = 1' in explain(1, 64, 128)
  assert 'H = 8' in explain(8, 8, 128)
  assert 'V = 257' in explain(8, 64, 256, normalize=True)
  wide = jax.ShapeDtypeStruct((1, 2, 64, 64), np.float64)
  with jax.enable_x64(True):
    assert 'float64' in explain(8, 64, 64, initial_state=wide)


def test_gates_that_reads_and_ops_need():
  shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
  keys, strength = shape(1, 8, 2, 64), shape(1, 8, 2)
  delta = functools.partial(explain_delta_rule, keys, keys, keys, strength)
  general = functools.partial(explain_dplr, *[keys] * 5)
  for explained in (
    delta(),
    delta(erase=keys),
    delta(read='exclusive', log_decay=keys),
    general(log_decay=keys),
  ):
    assert 'tpu: pallas_tpu' in explained
  assert "read = 'exclusive'" in delta(read='exclusive', log_decay=strength)
  assert 'not per channel' in general(log_decay=strength)
  assert 'not per channel' in general()


def test_pallas_is_imported_when_a_kernel_is_traced():
  code = """
import sys
import jax, jax.numpy as jnp
from efficient_attn import ops
q = jnp.ones((1, 3, 1, 16))
f = lambda q: ops.linear_attention(q, q, q)[0].sum()
jax.jit(jax.grad(f)).lower(q)
loaded = 'jax.experimental.pallas' in sys.modules
ops.linear_attention(q, q, q, implementation='pallas_tpu')
print(loaded, 'jax.experimental.pallas' in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ['False', 'True']
