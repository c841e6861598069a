"""The kernels of attention, interpreted, and who may call them."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax import attention_tiles
from efficient_attn.ops.softmax.attention import attention, explain_attention
from efficient_attn.ops.softmax.attention_reference import attention_reference
from tests.ops.attention_cases import make_arrays
from tests.optimized import optimized

KERNEL = 'pallas_tpu'
SIZES = dict(N=4, K=2, H=16, V=24)
RNG = np.random.default_rng(0)
IDS = np.repeat([4, 1, 2, 4], [100, 156, 44, 100])[None].repeat(2, 0)
IDS[1] = np.sort(IDS[1])
DENSE = RNG.random((2, 1, 400, 300)) < 0.01
AMONG = RNG.random((300,)) < 0.9
BIAS = RNG.standard_normal((2, 4, 300, 400)).astype(np.float32)
MANY = -RNG.exponential(0.3, (2, 600, 4)).astype(np.float32)
GATES = np.where(RNG.random((2, 300, 4)) < 0.05, -1000, MANY[:, :300])
GATES[:, 255:257] = -np.inf


def packed(mask=None):
  return masks.packed(mask, jnp.asarray(IDS))


# name: (T, S, mask, options); tiles are of 256 x 256.
CASES = {
  'packed_all': (
    400,
    400,
    lambda: masks.Causal() & packed(),
    dict(
      bias=lambda: scores.Alibi(jnp.asarray([0.1, 0.0, 0.3, 0.01])),
      sinks=lambda: jnp.asarray([0.5, -1.0, 2.0, 0.0]),
      logits_soft_cap=lambda: 2.0,
    ),
  ),
  'one_row_of_tiles': (5, 300, lambda: None, {}),
  'ragged': (513, 300, lambda: masks.Causal(), {}),
  'window': (1100, 1100, lambda: masks.Window(300, 0), {}),
  'prefix_packed': (400, 400, lambda: packed(masks.Prefix(3)), {}),
  'dense': (
    400,
    300,
    lambda: masks.Dense(DENSE),
    dict(scale=lambda: jnp.asarray(-0.7)),
  ),
  'heads': (
    300,
    300,
    lambda: masks.HeadWindow(jnp.asarray([0, 3, 90, 299]), np.arange(4)),
    {},
  ),
  'offset': (300, 260, lambda: masks.Causal(jnp.asarray([-9, -270])), {}),
  # Hard gates too, also where a tile ends.
  'forget': (
    300,
    300,
    lambda: masks.Causal() & masks.Dense(AMONG),
    dict(bias=lambda: scores.Forget(jnp.asarray(GATES, jnp.float32))),
  ),
  'forget_behind': (
    280,
    600,
    lambda: masks.Causal(jnp.int32(310)),
    dict(
      bias=lambda: (
        scores.Forget(jnp.asarray(MANY), jnp.int32(310))
        + scores.Dense(jnp.asarray(MANY[:1].transpose(0, 2, 1)[:, :, None]))
      ),
      logits_soft_cap=lambda: 2.0,
    ),
  ),
  'bias_of_keys': (
    300,
    400,
    lambda: None,
    dict(bias=lambda: scores.Dense(jnp.asarray(BIAS[:, :, :1]))),
  ),
  'bias_of_queries': (
    300,
    400,
    lambda: masks.Window(90, 3),
    dict(bias=lambda: scores.Dense(jnp.asarray(BIAS[:1, :, :300, :1]))),
  ),
  'constant_bias': (
    300,
    400,
    lambda: masks.Causal(100),
    dict(constant=lambda: scores.Dense(BIAS)),
  ),
  'blocks': (
    512,
    512,
    lambda: masks.Blocks(np.eye(8, dtype=bool)[::-1], 64, 64),
    {},
  ),
}


def make(name, dtype):
  T, S, mask, options = CASES[name]
  arrays = make_arrays(T, S, dtype=dtype, **SIZES)
  return arrays, mask(), {key: make() for key, make in options.items()}


def run(op, arrays, mask, options, cotangents):
  """(out, lse) with the gradients of arrays, bias and sinks."""
  learned = {k: options[k] for k in ('bias', 'sinks') if k in options}
  rest = {k: x for k, x in options.items() if k not in learned}
  if 'constant' in rest:
    rest['bias'] = rest.pop('constant')

  def call(arrays, learned):
    out, lse = op(*arrays, mask=mask, **learned, **rest)
    return out, jnp.where(jnp.isfinite(lse), lse, 0)

  out, pull = jax.vjp(call, arrays, learned)
  return out, pull(cotangents)


def reference(*args, **options):
  out, stats = attention_reference(*args, **options)
  return out, stats.lse


def errors(found, expected):
  return [
    np.abs(np.asarray(x, np.float64) - y).max() / max(1, np.abs(y).max())
    for x, y in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    )
    if x.dtype != jax.dtypes.float0
  ]


def check(name, dtype=np.float32):
  """Outputs and all gradients, against the reference in float64."""
  arrays, mask, options = make(name, dtype)
  T, V = arrays[0].shape[1], arrays[2].shape[3]
  rng = np.random.default_rng(1)
  shape = (2, T, SIZES['N'])
  cotangents = (
    jnp.asarray(rng.standard_normal((*shape, V)), dtype),
    jnp.asarray(rng.standard_normal(shape), jnp.float32),
  )
  kernel = functools.partial(attention, implementation=KERNEL, return_lse=True)
  how = mask, options, cotangents
  # Two programs: what a float64 program holds is no float32.
  found = jax.jit(lambda x: run(kernel, x, *how))(arrays)
  plain = jax.jit(lambda x: run(reference, x, *how))(arrays)
  with jax.enable_x64(True):
    to_64 = lambda x: (  # noqa: E731
      jnp.asarray(np.asarray(x, np.float64))
      if jnp.issubdtype(jnp.result_type(x), jnp.floating)
      else x
    )
    exact = jax.tree.map(to_64, (arrays, mask, options, cotangents))
    expected = jax.tree.map(np.asarray, run(reference, *exact))
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
    assert x.shape == y.shape and x.dtype == y.dtype
  floor = 1e-6 if dtype == np.float32 else 4e-3
  for error, of_plain in zip(
    errors(found, expected), errors(plain, expected), strict=True
  ):
    assert error <= 2 * of_plain + floor


@pytest.mark.parametrize('name', CASES)
def test_outputs_and_gradients(name):
  check(name)


@pytest.mark.in_turn
@pytest.mark.parametrize('name', ['packed_all', 'window'])
def test_bfloat16(name):
  check(name, jnp.bfloat16)


@pytest.mark.in_turn
@pytest.mark.parametrize('name', ['packed_all', 'forget_behind'])
def test_keys_that_do_not_fit_come_in_spans(monkeypatch, name):
  tiles = attention_tiles.KernelTiles(256, 256, 1, 0)
  monkeypatch.setattr(attention_tiles, 'KERNEL_TILES', {
    (None, 'float32'): tiles,
  })  # fmt: skip
  check(name)


def call(arrays, mask):
  return attention(*arrays, mask=mask, implementation=KERNEL)


optimized_call = optimized(call)


def test_causality_is_bitwise():
  T = 513
  one, two = (make_arrays(T, T, B=1, seed=seed, **SIZES) for seed in (0, 3))
  out = optimized_call(one, masks.Causal())
  for cut in (1, 255, 256, 300, 512):
    mixed = [
      jnp.concatenate([x[:, :cut], y[:, cut:]], 1)
      for x, y in zip(one, two, strict=True)
    ]
    found = optimized_call(mixed, masks.Causal())
    np.testing.assert_array_equal(found[:, :cut], out[:, :cut], f'{cut}')


def test_what_is_hidden_may_be_nan():
  """Padding in the same tile, and other segments in others."""
  T = 400
  arrays = make_arrays(T, T, B=1, **SIZES)
  ids = jnp.asarray(np.repeat([1, 0], [356, 44])[None])
  padding = masks.Dense((ids > 0)[:, None, None] & (ids > 0)[:, None, :, None])

  @jax.jit
  def grads(arrays):
    loss = lambda x: jnp.sum(jnp.sin(call(x, padding)))  # noqa: E731
    return jax.value_and_grad(loss)(arrays)

  dirty = [x.at[:, 356:].set(jnp.nan) for x in arrays]
  for x, y in zip(
    jax.tree.leaves(grads(dirty)), jax.tree.leaves(grads(arrays)), strict=True
  ):
    np.testing.assert_array_equal(x, y)


def test_another_segment_may_be_nan():
  """Where it has tiles of its own, which run time skips."""
  arrays = make_arrays(600, 600, B=1, **SIZES)
  ids = jnp.asarray(np.repeat([5, 7], [256, 344])[None])

  @jax.jit
  def grads(arrays):
    def loss(arrays):
      out = call(arrays, masks.packed(masks.Causal(), ids))
      return jnp.sum(jnp.sin(out[:, 256:]))

    return jax.value_and_grad(loss)(arrays)

  loss, expected = grads(arrays)
  dirty, found = grads([x.at[:, :256].set(jnp.nan) for x in arrays])
  assert loss == dirty
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_array_equal(x[:, 256:], y[:, 256:])


def test_without_a_name_a_cpu_runs_the_blockwise_form():
  arrays = make_arrays(600, 600, B=1, **SIZES)

  def grads(arrays, **how):
    out = lambda x: attention(*x, mask=masks.Causal(), **how)  # noqa: E731
    return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(out(x))))(arrays)

  found = jax.jit(grads)(arrays)
  expected = jax.jit(functools.partial(grads, implementation='blockwise'))
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected(arrays)), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def shape(T, H=64, V=64, dtype=np.float32):
  sizes = ((1, T, 4, H), (1, T, 2, H), (1, T, 2, V))
  return [jax.ShapeDtypeStruct(s, dtype) for s in sizes]


REFUSED = {
  'narrow': (shape(600, H=8), {}, 'H = 8'),
  'wide': (shape(600, V=512), {}, 'V = 512'),
  'half': (shape(600, dtype=np.float16), {}, 'float16'),
  'cap': (shape(600), dict(logits_soft_cap=jnp.ones(())), 'logits_soft_cap'),
  'bias': (
    shape(600),
    dict(bias=jnp.ones((600, 600))),
    'scores.Dense has no gradient of a whole matrix',
  ),
  'sum of biases': (
    shape(600),
    dict(
      bias=scores.Alibi(jnp.ones(4))
      + scores.Swin(jnp.ones((49**2, 4)), (25, 25))
    ),
    'scores.Sum has Swin, which has no rule',
  ),
  'long': (shape(2**18), {}, 'tiles, it takes'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_a_kernel_refuses_it_says(name):
  arrays, options, message = REFUSED[name]
  named = explain_attention(*arrays, implementation=KERNEL, **options)
  assert named.startswith(f'none; not {KERNEL}: ') and message in named
  fallback = explain_attention(
    *arrays, implementation=(KERNEL, 'xla'), **options
  )
  assert fallback.split(':')[0] in ('reference', 'blockwise')
  assert message in explain_attention(*arrays, **options)


def test_a_tpu_takes_the_kernel_where_others_take_tiles():
  assert explain_attention(*shape(600)).endswith('; on tpu pallas_tpu')
  assert 'tpu' not in explain_attention(*shape(128))
  assert explain_attention(*shape(128), implementation=KERNEL).startswith(
    'pallas_tpu: the implementation asked for'
  )


@pytest.mark.in_turn
def test_vmap_equals_the_reference():
  q, k, v = (x[:, None] for x in make_arrays(300, 300, **SIZES))
  ids = jnp.asarray(IDS[:, None, :300])

  def loss(arrays, ids, implementation):
    mask = masks.Causal() & masks.Segments(ids)
    out = attention(*arrays, mask=mask, implementation=implementation)
    return jnp.sum(jnp.sin(out))

  found, expected = (
    jax.jit(jax.vmap(jax.grad(functools.partial(loss, implementation=name))))(
      (q, k, v), ids
    )
    for name in (KERNEL, 'reference')
  )
  assert max(errors(found, expected)) < 1e-6


@pytest.mark.in_turn
def test_forward_mode_and_second_derivatives():
  arrays = make_arrays(600, 600, B=1, **SIZES)

  def loss(arrays, implementation):
    out = attention(*arrays, mask=masks.Causal(), implementation=implementation)
    return jnp.sum(jnp.sin(out))

  def second(arrays, implementation):
    grad = jax.grad(functools.partial(loss, implementation=implementation))
    return jax.jvp(grad, (arrays,), (arrays,))[1]

  found, expected = (
    jax.jit(functools.partial(second, implementation=name))(arrays)
    for name in (None, 'reference')
  )
  assert max(errors(found, expected)) < 1e-5


def test_tiles_are_of_the_mesh_and_not_of_the_host():
  assert jax.device_count() > 1
  assert attention_tiles.costs_here() == attention_tiles.MACHINE
  mesh = jax.make_mesh((2,), ('data',))
  with jax.set_mesh(mesh):
    assert attention_tiles.costs_here() == attention_tiles.CORE
    assert attention_tiles.device_here() == 'cpu'
  assert attention_tiles.device_here() is None


def test_pallas_is_imported_when_a_kernel_is_traced():
  code = """
import sys
import jax, jax.numpy as jnp
from efficient_attn import ops
q = jnp.ones((1, 600, 1, 16))
f = lambda q, **how: ops.attention(q, q, q, **how).sum()
jax.jit(jax.grad(f)).lower(q)
loaded = 'jax.experimental.pallas' in sys.modules
jax.jit(lambda q: f(q, implementation='pallas_tpu')).lower(q)
print(loaded, 'jax.experimental.pallas' in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ['False', 'True']
