import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax.attention import IMPLEMENTATIONS as PUBLIC
from tests.ops.attention_cases import (
  EXTRAS,
  MASKS,
  attention_blockwise,
  attention_reference,
  expressions,
  make_arrays,
  make_data,
  make_extras,
)
from tests.optimized import optimized
from tests.oracles import attention as oracle

BLOCK = 4
blockwise = functools.partial(attention_blockwise, block_q=BLOCK, block_k=3)
# Blocks so small that every case has many tiles.
IMPLEMENTATIONS = {'reference': attention_reference, 'blockwise': blockwise}
assert set(IMPLEMENTATIONS) == set(PUBLIC)

each_implementation = pytest.mark.parametrize('name', list(IMPLEMENTATIONS))


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def loss(op, weights, q, k, v, mask, extras):
  """Uses out and lse, so that the cotangent of neither is zero."""
  out, lse = op(q, k, v, mask=mask, **extras)
  finite = jnp.where(lse == -jnp.inf, 0, lse)
  total = jnp.sum(weights[0] * out) + jnp.sum(weights[1] * finite)
  return total, (out, lse)


def make_weights(q, v):
  rng = np.random.default_rng(9)
  shape = q.shape[:3]
  return rng.standard_normal(shape + v.shape[-1:]), rng.standard_normal(shape)


def make_case(mask, T, S, extras, sizes):
  q, k, v = make_arrays(T, S, dtype=np.float64, **dict(sizes))
  shape = (q.shape[0], q.shape[2], T, S)
  data = make_data(*shape)
  ours, theirs = make_extras(extras, *shape)
  admitted = oracle.admitted(oracle.rules(data)[mask], shape)
  return (q, k, v), expressions(data)[mask], ours, theirs, admitted


@functools.cache
def run(name, *case):
  """((out, lse), gradients) of one implementation, in float64."""
  (q, k, v), mask, ours, _, _ = make_case(*case)
  weights = make_weights(q, v)
  leaves = {x: ours[x] for x in ('bias', 'sinks') if x in ours}
  static = {x: ours[x] for x in ours if x not in leaves}

  def f(q, k, v, leaves):
    op = IMPLEMENTATIONS[name]
    return loss(op, weights, q, k, v, mask, static | leaves)

  grad = jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True)
  grad = jax.jit(grad)
  (_, out), gradients = grad(q, k, v, leaves)
  return out, gradients


def check(name, mask, T, S, extras='plain', **sizes):
  """Forward against the oracle, gradients against the reference's."""
  case = (mask, T, S, extras, tuple(sizes.items()))
  (q, k, v), _, _, theirs, admitted = make_case(*case)
  out, gradients = run(name, *case)
  expected = oracle.attention(q, k, v, admitted, **theirs)
  check_close(out, gradients, expected, run('reference', *case)[1])


def check_close(out, gradients, expected, expected_gradients):
  for x, y in zip(out, expected, strict=True):
    assert x.dtype == jnp.float64
    np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
  expected = expected_gradients
  assert jax.tree.structure(gradients) == jax.tree.structure(expected)
  for x, y in zip(
    jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True
  ):
    chex.assert_tree_all_finite(x)
    np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)


@jax.jit
def dense(q, k, v, admitted):
  """The reference with a mask that is an array: one program for all masks."""
  f = functools.partial(loss, attention_reference, make_weights(q, v))
  mask = masks.Dense(admitted)
  grad = jax.grad(
    lambda *qkv: f(*qkv, mask, {}), argnums=(0, 1, 2), has_aux=True
  )
  return grad(q, k, v)


@functools.cache
def reference_outputs(T, S):
  """What the reference makes of each mask, in one program."""
  cases = {mask: make_case(mask, T, S, 'plain', ()) for mask in MASKS}

  def outputs(q, k, v):
    return {
      mask: attention_reference(q, k, v, mask=expression)
      for mask, (_, expression, *_) in cases.items()
    }

  return jax.jit(outputs)(*cases['none'][0])


@pytest.mark.parametrize('mask', MASKS)
def test_masks(x64, mask):
  case = (mask, 11, 13, 'plain', ())
  (q, k, v), *_, admitted = make_case(*case)
  expected = oracle.attention(q, k, v, admitted)
  gradients, out = dense(q, k, v, admitted)
  found, (*found_gradients, _) = run('blockwise', *case)
  check_close(found, tuple(found_gradients), expected, gradients)
  check_close(out, gradients, expected, gradients)
  check_close(reference_outputs(11, 13)[mask], (), expected, ())


@each_implementation
@pytest.mark.parametrize(
  'T, S',
  [(1, 1), (1, 13), (BLOCK - 1, 5), (BLOCK, BLOCK), (BLOCK + 1, 3), (13, 13)],
)
@pytest.mark.parametrize('mask', ['none', 'segments_and_causal'])
def test_sizes(x64, name, mask, T, S):
  check(name, mask, T, S)


@each_implementation
@pytest.mark.parametrize('extras', list(EXTRAS))
def test_extras(x64, name, extras):
  check(name, 'causal_behind', 9, 7, extras)


@each_implementation
@pytest.mark.parametrize('N, K', [(4, 4), (4, 1), (6, 2), (1, 1)])
def test_grouped_queries(x64, name, N, K):
  check(name, 'dense', 7, 5, 'all', N=N, K=K, H=3, V=5)


@pytest.mark.parametrize('extras', list(EXTRAS))
def test_reference_gradients_against_differences_of_the_oracle(x64, extras):
  case = ('causal_behind', 5, 6, extras, ())
  arrays, _, _, theirs, admitted = make_case(*case)
  weights = make_weights(arrays[0], arrays[2])
  *gradients, leaves = run('reference', *case)[1]
  inputs = [np.asarray(x) for x in arrays]
  if 'sinks' in theirs:
    inputs.append(theirs.pop('sinks'))
    gradients.append(leaves['sinks'])

  def f(q, k, v, sinks=None):
    out, lse = oracle.attention(q, k, v, admitted, sinks=sinks, **theirs)
    finite = np.where(lse == -np.inf, 0, lse)
    return (weights[0] * out).sum() + (weights[1] * finite).sum()

  rng = np.random.default_rng(2)
  for axis, gradient in enumerate(gradients):
    step = 1e-5 * rng.standard_normal(inputs[axis].shape)
    above, below = list(inputs), list(inputs)
    above[axis], below[axis] = inputs[axis] + step, inputs[axis] - step
    difference = (f(*above) - f(*below)) / 2
    found = (np.asarray(gradient) * step).sum()
    np.testing.assert_allclose(found, difference, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize(
  'shape', [(2, 4, 9, 7), (4, 9, 1), (2, 1, 9, 7), (7,), ()]
)
def test_gradients_of_dense_biases(x64, shape):
  q, k, v = make_arrays(9, 7, dtype=np.float64)
  bias = jnp.asarray(np.random.default_rng(3).standard_normal(shape))

  def f(bias, implementation):
    op = IMPLEMENTATIONS[implementation]
    out, lse = op(q, k, v, bias=scores.Dense(bias), mask=masks.Causal(1))
    return jnp.sum(out**2) + jnp.sum(lse)

  grad = jax.jit(jax.grad(f), static_argnums=1)
  found, expected = (grad(bias, name) for name in IMPLEMENTATIONS)
  np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@each_implementation
def test_a_new_score_needs_no_gradient_rule(x64, name):
  @masks.expression
  class Relative(scores.Score):
    table: jax.Array

    def tile(self, rows, cols):
      return self.table[:, rows[:, None] - cols + 20][None]

  q, k, v = make_arrays(9, 7, dtype=np.float64)
  table = jnp.asarray(np.random.default_rng(3).standard_normal((4, 40)))
  dense = table[:, np.arange(9)[:, None] - np.arange(7) + 20]

  def f(bias, op):
    return jnp.sum(op(q, k, v, bias=bias)[0] ** 2)

  grad = jax.jit(jax.grad(f), static_argnums=1)
  found = grad(Relative(table), IMPLEMENTATIONS[name]).table
  wanted = grad(scores.Dense(dense), attention_reference).array
  expected = np.zeros((4, 40))
  for t, s in np.ndindex(9, 7):
    expected[:, t - s + 20] += wanted[:, t, s]
  np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@each_implementation
@pytest.mark.parametrize('mask', ['causal', 'window_and_causal'])
def test_causality_is_bitwise(name, mask):
  T = 13
  q, k, v = make_arrays(T, T)
  data = make_data(2, 4, T, T)
  expression = expressions(data)[mask]
  op = optimized(IMPLEMENTATIONS[name])
  base = op(q, k, v, mask=expression)
  for cut in range(1, T, 3):
    after = np.arange(T)[None, :, None, None] >= cut
    q2, k2, v2 = (jnp.where(after, -9 * x + 4, x) for x in (q, k, v))
    for x, y in zip(base, op(q2, k2, v2, mask=expression), strict=True):
      np.testing.assert_array_equal(x[:, :cut], y[:, :cut], f'cut at {cut}')


@each_implementation
def test_a_row_without_keys_is_zero_with_zero_gradients(name):
  q, k, v = make_arrays(9, 9)
  mask = masks.Causal(-4)
  op = jax.jit(IMPLEMENTATIONS[name])
  out, lse = op(q, k, v, mask=mask)
  np.testing.assert_array_equal(out[:, :4], 0)
  np.testing.assert_array_equal(lse[:, :4], -jnp.inf)
  chex.assert_tree_all_finite(lse[:, 4:])

  def f(q, k, v):
    return jnp.sum(op(q, k, v, mask=mask)[0] ** 2)

  dq, dk, dv = jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v)
  np.testing.assert_array_equal(dq[:, :4], 0)
  np.testing.assert_array_equal(dk[:, -4:], 0)
  chex.assert_tree_all_finite((dq, dk, dv))
  sinks = jnp.arange(4.0)
  out, lse = op(q, k, v, mask=mask, sinks=sinks)
  np.testing.assert_array_equal(out[:, :4], 0)
  np.testing.assert_allclose(lse[:, :4], jnp.broadcast_to(sinks, (2, 4, 4)))


@each_implementation
def test_a_bias_of_minus_infinity_is_a_mask(name):
  q, k, v = make_arrays(9, 9)
  mask = masks.Causal(-2)
  bias = scores.Dense(jnp.where(mask.dense(9, 9), 0.0, -jnp.inf))

  def f(q, **how):
    out, _ = IMPLEMENTATIONS[name](q, k, v, logits_soft_cap=2.0, **how)
    return jnp.sum(out**2), out

  grad = jax.jit(jax.value_and_grad(f, has_aux=True))
  (_, x), dx = grad(q, bias=bias)
  (_, y), dy = grad(q, mask=mask)
  np.testing.assert_allclose(x, y, atol=1e-6)
  np.testing.assert_allclose(dx, dy, atol=1e-6)


def test_large_logits_do_not_overflow():
  q, k, v = make_arrays(9, 9)
  for name in IMPLEMENTATIONS:
    out, lse = IMPLEMENTATIONS[name](1e3 * q, 1e3 * k, v)
    chex.assert_tree_all_finite(out)
    chex.assert_tree_all_finite(lse)


def test_bfloat16_error_is_at_most_twice_that_of_the_reference():
  T = 64
  q, k, v = make_arrays(T, T, H=16, V=16, dtype=jnp.bfloat16)
  mask = masks.Causal()
  with jax.enable_x64(True):
    exact = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]

  def run(op, arrays):
    def f(*arrays):
      out, _ = op(*arrays, mask=mask)
      return jnp.sum(jnp.sin(out.astype(jnp.promote_types(out.dtype, 'f4'))))

    gradients = optimized(jax.grad(f, argnums=(0, 1, 2)))(*arrays)
    found = [*optimized(op)(*arrays, mask=mask), *gradients]
    return [np.asarray(x, np.float64) for x in found]

  with jax.enable_x64(True):
    wanted = run(attention_reference, exact)
  tiled = functools.partial(attention_blockwise, block_q=16, block_k=8)
  for x, y, z in zip(
    run(tiled, (q, k, v)),
    run(attention_reference, (q, k, v)),
    wanted,
    strict=True,
  ):
    assert np.abs(x - z).max() <= 2 * np.abs(y - z).max()
  out, lse = tiled(q, k, v)
  assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32


@each_implementation
def test_packed_is_separate(name):
  q, k, v = make_arrays(12, 12, B=1)
  op = IMPLEMENTATIONS[name]
  ids = jnp.array([[7] * 5 + [1] * 2 + [2] * 5])

  def f(q, k, v, mask):
    out, _ = op(q, k, v, mask=mask)
    return jnp.sum(out**2), out

  grad = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)
  grad = jax.jit(grad)
  packed = masks.Causal() & masks.Segments(ids, ids)
  (_, out), gradients = grad(q, k, v, packed)
  for start, stop in ((0, 5), (5, 7), (7, 12)):
    parts = (x[:, start:stop] for x in (q, k, v))
    (_, alone), expected = grad(*parts, masks.Causal())
    for x, y in zip((out, *gradients), (alone, *expected), strict=True):
      np.testing.assert_allclose(x[:, start:stop], y, atol=2e-6)


@each_implementation
def test_vmap_is_a_loop(name):
  sets = [make_arrays(7, 9, seed=seed) for seed in range(3)]
  stacked = [jnp.stack(x) for x in zip(*sets, strict=True)]
  rng = np.random.default_rng(0)
  q_ids = jnp.asarray(np.sort(rng.integers(0, 3, (3, 2, 7))))
  k_ids = jnp.asarray(np.sort(rng.integers(0, 3, (3, 2, 9))))

  def f(q, k, v, q_ids, k_ids):
    mask = masks.Segments(q_ids, k_ids) & ~masks.Window(0, 0)
    out, lse = IMPLEMENTATIONS[name](q, k, v, mask=mask, logits_soft_cap=3.0)
    return jnp.sum(out**2) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse))

  g = jax.value_and_grad(f, argnums=(0, 1, 2))
  mapped = jax.jit(jax.vmap(g))(*stacked, q_ids, k_ids)
  g = jax.jit(g)
  for i, arrays in enumerate(sets):
    alone = g(*arrays, q_ids[i], k_ids[i])
    for x, y in zip(
      jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True
    ):
      np.testing.assert_allclose(x[i], y, rtol=2e-5, atol=2e-6)


def test_scan_and_remat_are_safe():
  q, k, v = make_arrays(7, 7, K=4, V=4)

  def f(q, k, v, op):
    @jax.checkpoint
    def layer(x, _):
      return x + op(x, k, v, mask=masks.Causal())[0], None

    return jnp.sum(jax.lax.scan(layer, q, length=3)[0] ** 2)

  grad = jax.jit(jax.grad(f, argnums=(0, 1, 2)), static_argnums=3)
  for x, y in zip(
    grad(q, k, v, blockwise), grad(q, k, v, attention_reference), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.in_turn
def test_sharded_is_unsharded():
  q, k, v = make_arrays(7, 7, B=2, N=8, K=4)
  ids = jnp.array([[0] * 3 + [1] * 4, [0] * 5 + [1] * 2])
  sinks = jnp.linspace(-1.0, 1.0, 8)
  slopes = jnp.asarray(scores.alibi_slopes(8))
  heads = P('data', None, 'model', None)
  specs = (heads, heads, heads, P('data'), P('model'), P('model'))

  def op(q, k, v, ids, sinks, slopes):
    mask = masks.Causal() & masks.Segments(ids, ids)
    bias = scores.Alibi(slopes)
    return blockwise(q, k, v, mask=mask, bias=bias, sinks=sinks)[0]

  def gradients(op):
    argnums = (0, 1, 2, 4, 5)
    return optimized(jax.grad(lambda *x: jnp.sum(op(*x) ** 2), argnums))

  arrays = (q, k, v, ids, sinks, slopes)
  expected = gradients(op)(*arrays)
  mesh = jax.make_mesh(
    (2, 4), ('data', 'model'), (jax.sharding.AxisType.Explicit,) * 2
  )
  with jax.set_mesh(mesh):
    local = jax.shard_map(op, in_specs=specs, out_specs=heads, check_vma=False)
    found = gradients(local)(
      *(jax.device_put(x, s) for x, s in zip(arrays, specs, strict=True))
    )
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
