"""The forget-gate bias of FoX, alone and inside attention."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax.attention_blockwise import attention_blockwise
from efficient_attn.ops.softmax.attention_reference import attention_reference
from tests.ops.attention_cases import make_arrays
from tests.optimized import optimized
from tests.oracles import attention as oracle
from tests.oracles import forget

T = 11
IMPLEMENTATIONS = {
  'reference': attention_reference,
  # Tiles before, across and after the diagonal, with a shared last one.
  'blockwise': functools.partial(attention_blockwise, block_q=4, block_k=3),
}
each_implementation = pytest.mark.parametrize('name', sorted(IMPLEMENTATIONS))
IDS = np.repeat([[3, 1, 3], [0, 1, 2]], [4, 1, 6], axis=1)


def gates(shape, hard=0.0, value=-1000.0, seed=4):
  rng = np.random.default_rng(seed)
  soft = -rng.exponential(0.3, shape)
  return np.where(rng.random(shape) < hard, value, soft)


@pytest.mark.parametrize('offset', [0, 4])
def test_spans(offset):
  log_forget = gates((2, T, 3))
  with jax.enable_x64(True):
    score = scores.Forget(jnp.asarray(log_forget), offset)
    found = score.dense(T - offset, T)
  expected = forget.spans(log_forget, T - offset, offset)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize('value', [-1000.0, -np.inf])
def test_hard_gates_do_not_blur_the_spans_between_them(value):
  size, block = 192, 64
  log_forget = gates((1, size, 2), hard=0.1, value=value).astype(np.float32)
  finite = np.maximum(log_forget, -1e30)
  expected = np.exp(forget.spans(finite, size)) * np.tri(size)
  score = scores.Forget(jnp.asarray(log_forget))
  tile = optimized(score.tile)
  for i in range(0, size, block):
    for j in range(0, i + 1, block):
      found = tile(i + jnp.arange(block), j + jnp.arange(block))
      chex.assert_tree_all_finite(found)
      here = np.tri(block, k=i - j)
      np.testing.assert_allclose(
        np.exp(np.float64(found)) * here,
        expected[:, :, i : i + block, j : j + block],
        rtol=0,
        atol=2e-7,
      )


@functools.cache
def run(name):
  """Output and the gradients of q, k, v and log_forget, in float64."""
  weight = np.random.default_rng(5).standard_normal((2, T, 4, 3))
  with jax.enable_x64(True):
    q, k, v = make_arrays(T, T, dtype=np.float64)

    def loss(q, k, v, log_forget):
      mask = masks.Causal() & masks.Segments(IDS, IDS)
      out, _ = IMPLEMENTATIONS[name](
        q, k, v, mask=mask, bias=scores.Forget(log_forget)
      )
      return jnp.sum(weight * out), out

    grad = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    grad = jax.jit(grad)
    arrays = (q, k, v, jnp.asarray(gates((2, T, 4))))
    (_, out), gradients = grad(*arrays)
  return weight, arrays, out, gradients


@each_implementation
def test_attention_meets_the_oracle(name):
  weight, arrays, out, gradients = run(name)
  # `Segments` admits by id alone: those of row 0 come back.
  rule = lambda b, n, q, k: k <= q and IDS[b, q] == IDS[b, k]  # noqa: E731
  admitted = oracle.admitted(rule, (2, 4, T, T))

  def f(q, k, v, log_forget):
    bias = forget.spans(log_forget, T)
    return oracle.attention(q, k, v, admitted, bias=bias)[0]

  arrays = [np.asarray(x) for x in arrays]
  np.testing.assert_allclose(out, f(*arrays), rtol=0, atol=1e-13)
  rng = np.random.default_rng(6)
  for i, gradient in enumerate(gradients):
    step = 1e-5 * rng.standard_normal(arrays[i].shape)
    above, below = list(arrays), list(arrays)
    above[i], below[i] = arrays[i] + step, arrays[i] - step
    slope = (weight * (f(*above) - f(*below))).sum() / 2
    found = np.vdot(gradient, step)
    np.testing.assert_allclose(found, slope, rtol=1e-6)


def test_implementations_agree_in_gradients():
  for x, y in zip(run('blockwise')[3], run('reference')[3], strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


@each_implementation
def test_causality_is_bitwise(name):
  arrays = (*make_arrays(T, T), jnp.asarray(gates((2, T, 4)), jnp.float32))

  @optimized
  def op(q, k, v, log_forget):
    bias = scores.Forget(log_forget)
    return IMPLEMENTATIONS[name](q, k, v, mask=masks.Causal(), bias=bias)[0]

  base = op(*arrays)
  for cut in (1, 3, 4, 6, 10):
    changed = [x.at[:, cut:].multiply(300) for x in arrays]
    found = op(*changed)
    np.testing.assert_array_equal(
      found[:, :cut], base[:, :cut], f'cut at {cut}'
    )
    assert (found[:, cut:] != base[:, cut:]).any(), cut


@each_implementation
def test_a_closed_gate_hides_the_past_from_values_and_gradients(name):
  q, k, v = make_arrays(T, T)
  cut = 5
  log_forget = jnp.asarray(gates((2, T, 4)), jnp.float32)
  closed = log_forget.at[:, cut].set(-jnp.inf)

  @jax.jit
  def grad(q, k, v, log_forget):
    def loss(v):
      bias = scores.Forget(log_forget)
      out = IMPLEMENTATIONS[name](q, k, v, mask=masks.Causal(), bias=bias)[0]
      return jnp.sum(out[:, -3:] ** 2), out

    return jax.value_and_grad(loss, has_aux=True)(v)

  (_, out), dv = grad(q, k, v, closed)
  after = [x[:, cut:] for x in (q, k, v, log_forget)]
  (_, alone), expected = grad(*after)
  np.testing.assert_allclose(out[:, cut:], alone, atol=1e-6)
  np.testing.assert_allclose(dv[:, cut:], expected, atol=1e-6)
  np.testing.assert_array_equal(dv[:, :cut], 0)


def test_wrong_length_is_an_error():
  with pytest.raises(ValueError, match=r'\[B, S, N\] with S = 9'):
    scores.Forget(jnp.zeros((2, 8, 4))).dense(9, 9)
