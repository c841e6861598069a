"""The kernels of linear_attention, interpreted, and who may call them."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.linear_attention import (
  explain_linear_attention,
  linear_attention,
)
from tests.ops.linear_attention_cases import (
  assert_close,
  cotangents_of,
  make,
  to_jax,
)
from tests.optimized import optimized
from tests.oracles import linear_attention as oracle

SIZES = dict(batch=2, heads=4, channels=16, values=24)
KERNEL = 'pallas_tpu'

# name: (length, kv heads, with a state, with segments, options); chunks are of
# 128 tokens.
FEATURES = {
  'short': (5, 4, False, False, {}),
  'chunk': (128, 4, True, False, {'scale': -0.3}),
  'grouped': (131, 2, True, True, {}),
  'one_key_head': (259, 1, True, True, {'form': 'chunkwise'}),
  'normalize': (130, 2, True, True, {'normalize': True}),
  'bidirectional': (130, 2, False, True, {'bidirectional': True}),
  'exclusive_bonus': (131, 2, True, True, {'read': 'exclusive'}),
}


@functools.partial(jax.jit, static_argnums=0)
def _vjp(call, arrays, cotangents):
  out, pull = jax.vjp(call, arrays)
  return *out, pull(cotangents)[0]


def vjp(arrays, cotangents, options, **how):
  """The output, the state and the gradient of every array."""
  options = ids_to_jax(options)
  call = lambda arrays: linear_attention(**arrays, **options, **how)  # noqa: E731
  return _vjp(call, to_jax(arrays), to_jax(cotangents))


def ids_to_jax(options):
  ids = options.get('segment_ids')
  return options if ids is None else options | {'segment_ids': jnp.asarray(ids)}


def case(gate, feature, dtype=np.float32, seed=0, change=None):
  """Arrays, cotangents, options and what float64 gives for these arrays."""
  length, kv_heads, state, segments, options = FEATURES[feature]
  options = dict(options)
  form = options.pop('form', None)
  arrays, options = make(
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
  cotangents = cotangents_of(arrays, options)
  low = {'q', 'k', 'v'}
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
  out, state = oracle.linear_attention(**exact[0], **options)
  with jax.enable_x64(True):
    found = vjp(*exact, options, form='recurrent')
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
  ('scalar', 'grouped'),
  ('none', 'short'),
  ('constant', 'chunk'),
  ('scalar', 'one_key_head'),
  ('scalar', 'normalize'),
  ('constant', 'bidirectional'),
  ('channel', 'grouped'),
  ('channel', 'chunk'),
  ('channel', 'one_key_head'),
  ('channel', 'exclusive_bonus'),
]


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
@pytest.mark.parametrize('gate, feature', CASES)
def test_outputs_states_and_gradients(gate, feature, dtype):
  arrays, cotangents, options, expected = case(gate, feature, dtype)
  found = vjp(arrays, cotangents, options, implementation=KERNEL)
  plain = vjp(arrays, cotangents, options, implementation='xla')
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


@pytest.mark.parametrize('gate', ['constant', 'scalar', 'channel'])
def test_hard_and_strong_gates(gate):
  arrays, cotangents, options, expected = case(gate, 'grouped', change=hard)
  found = vjp(arrays, cotangents, options, implementation=KERNEL)
  assert max(errors(found, expected)) < 2e-6


def run(arrays, options=(), **how):
  call = lambda a: linear_attention(**a, **ids_to_jax(dict(options)), **how)  # noqa: E731
  return jax.jit(call)(to_jax(arrays))


@pytest.mark.parametrize('gate', ['scalar', 'channel'])
def test_causality_is_bitwise(gate):
  sizes = dict(length=259, segments=True, dtype=np.float32, **SIZES)
  (arrays, options), (other, others) = (
    make(gate, seed=seed, **sizes) for seed in (0, 3)
  )

  @optimized
  def call(arrays, ids):
    return linear_attention(**arrays, segment_ids=ids, implementation=KERNEL)[0]

  out = np.asarray(call(to_jax(arrays), options['segment_ids']))
  for cut in (1, 100, 127, 128, 129, 258):

    def splice(x, y, cut=cut):
      return np.concatenate([x[:, :cut], y[:, cut:]], 1)

    changed = call(
      to_jax(jax.tree.map(splice, arrays, other)),
      splice(options['segment_ids'], others['segment_ids']),
    )
    np.testing.assert_array_equal(changed[:, :cut], out[:, :cut], f'{cut}')


@pytest.mark.parametrize('gate', ['scalar', 'channel'])
def test_packed_equals_separate(gate):
  lengths = (100, 28, 1, 90)
  ids = np.repeat([4, 1, 2, 4], lengths)[None].astype(np.int32)
  arrays, _ = make(gate, sum(lengths), dtype=np.float32, **SIZES | {'batch': 1})
  out, state = run(arrays, dict(segment_ids=ids), implementation=KERNEL)
  start = 0
  for length in lengths:
    part = {name: x[:, start : start + length] for name, x in arrays.items()}
    own, last = oracle.linear_attention(**part)
    assert_close(out[:, start : start + length], own, 1e-6)
    start += length
  assert_close(state, last, 1e-6)


@pytest.mark.parametrize('gate', ['scalar', 'channel'])
def test_a_nan_of_a_segment_that_is_over_stays_there(gate):
  ids = np.repeat([0, 1], [100, 159])[None].astype(np.int32)
  arrays, _ = make(gate, 259, dtype=np.float32, **SIZES | {'batch': 1})
  clean, last = run(arrays, dict(segment_ids=ids), implementation=KERNEL)
  for name in ('v', 'initial_state')[gate == 'channel' :]:
    dirty = dict(arrays)
    if name == 'v':
      dirty['v'] = arrays['v'].copy()
      dirty['v'][:, 3] = np.nan
    else:
      dirty[name] = np.full((1, 4, 16, 24), np.nan, np.float32)
    out, state = run(dirty, dict(segment_ids=ids), implementation=KERNEL)
    np.testing.assert_array_equal(out[:, 128:], clean[:, 128:])
    np.testing.assert_array_equal(state, last)


@pytest.mark.parametrize('gate', ['scalar', 'channel'])
def test_state_continues_at_a_cut(gate):
  arrays, _ = make(gate, 259, state=True, dtype=np.float32, **SIZES)
  expected = oracle.linear_attention(**arrays)
  state = arrays.pop('initial_state')
  outs = []
  for span in (slice(0, 100), slice(100, 259)):
    part = {name: x[:, span] for name, x in arrays.items()}
    out, state = run({**part, 'initial_state': state}, implementation=KERNEL)
    outs.append(out)
  assert_close((np.concatenate(outs, 1), state), expected, 1e-6)


@pytest.mark.parametrize('gate', ['scalar', 'channel'])
def test_vmap_equals_a_loop(gate):
  arrays, _ = make(gate, 130, dtype=np.float32, **SIZES | {'batch': 3})
  arrays = to_jax(arrays)
  row = lambda a: linear_attention(  # noqa: E731
    **jax.tree.map(lambda x: x[None], a), implementation=KERNEL
  )[0][0]
  loss = lambda a: jnp.sum(jnp.sin(row(a)))  # noqa: E731
  found = jax.jit(jax.vmap(jax.value_and_grad(loss)))(arrays)
  whole = lambda a: jax.vmap(loss)(a)  # noqa: E731
  again = jax.jit(lambda a: jax.vjp(whole, a)[1](jnp.ones(3))[0])(arrays)
  assert_close(found[1], again, 1e-6)
  out, _ = run(arrays, implementation='xla')
  assert_close(found[0], jnp.sum(jnp.sin(out), (1, 2, 3)), 1e-5)


def test_without_a_name_a_cpu_runs_the_plain_form():
  arrays, _ = make('scalar', 37, dtype=np.float32, **SIZES)
  for x, y in zip(
    jax.tree.leaves(run(arrays)),
    jax.tree.leaves(run(arrays, implementation='xla')),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def test_chunks_within_a_span_of_saved_states():
  """The plain form's own backward pass, for every chunk size."""
  arrays, cotangents, options, expected = case('scalar', 'grouped')
  for chunk_size in (16, 64, 128):
    found = vjp(arrays, cotangents, options, chunk_size=chunk_size)
    assert max(errors(found, expected)) < 2e-6


REFUSED = {
  'form': (dict(form='recurrent'), "form = 'recurrent'"),
  'chunk': (dict(chunk_size=256), 'chunk_size = 256'),
  'read': (dict(read='exclusive'), "read = 'exclusive'"),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_a_kernel_refuses_it_says(name):
  options, message = REFUSED[name]
  arrays = to_jax(make('scalar', 5, dtype=np.float32, **SIZES)[0])
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
