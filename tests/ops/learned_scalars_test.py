"""Scales and soft caps that are learned: arrays, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.recurrent.gated_slot_attention import (
  gated_slot_attention,
)
from efficient_attn.ops.recurrent.mlstm import mlstm
from efficient_attn.ops.softmax.attention import attention


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def draw(*shape):
  rng = np.random.default_rng(len(shape) + sum(shape))
  return jnp.asarray(rng.standard_normal(shape))


def softmax(scale, cap, implementation):
  q, k, v = draw(3, 2, 20, 2, 8)
  return attention(
    q,
    k,
    v,
    mask=masks.Causal(),
    scale=scale,
    logits_soft_cap=cap,
    implementation=implementation,
  )


def recurrent(op, scale, form):
  q, k, v = draw(3, 2, 20, 2, 8)
  if op is mlstm:
    gates = draw(2, 20, 2), -jnp.abs(draw(2, 20, 2))
  else:
    gates = (-jnp.abs(draw(2, 20, 2, 4)),)
  arrays = (q, k, v, *gates) if op is mlstm else (q, k, v)
  rest = {} if op is mlstm else dict(log_decay=gates[0])
  return op(*arrays, **rest, scale=scale, form=form, chunk_size=8)[0]


def assert_learned(function, *values):
  """The value of numbers, and derivatives as finite differences have them."""
  weight = draw(2, 20, 2, 8)

  def loss(*x):
    return jnp.sum(weight * function(*x))

  found, gradients = jax.jit(
    jax.value_and_grad(loss, argnums=range(len(values)))
  )(*map(jnp.asarray, values))
  np.testing.assert_allclose(found, loss(*values), rtol=1e-12)
  for i, gradient in enumerate(gradients):
    step = 1e-6 * np.eye(len(values))[i]
    up, down = loss(*(values + step)), loss(*(values - step))
    np.testing.assert_allclose(gradient, (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize('implementation', ['reference', 'blockwise'])
def test_softmax(implementation):
  assert_learned(
    lambda scale, cap: softmax(scale, cap, implementation),
    *np.array([0.7, 1.5]),
  )


@pytest.mark.parametrize('form', ['recurrent', 'chunkwise'])
@pytest.mark.parametrize('op', [mlstm, gated_slot_attention])
def test_recurrences(op, form):
  assert_learned(lambda scale: recurrent(op, scale, form), np.float64(0.7))


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda x: x[:0], 'axis B is 0; it must be at least 1'),
    (lambda x: x.astype(jnp.float8_e4m3fn), 'cast it to a floating type of 16'),
  ],
)
def test_what_no_implementation_can(change, message):
  q, k, v = (change(x) for x in draw(3, 2, 20, 2, 8))
  for name in ('reference', 'blockwise'):
    with pytest.raises(ValueError, match=message):
      attention(q, k, v, implementation=name)


def test_elastic_windows_of_millions_of_tokens():
  mask = masks.ElasticWindow(np.array([0, 5]), np.array([1024, 512]))
  query = 2**31 - 2000
  first = mask._first(jnp.int32(query)).ravel()
  np.testing.assert_array_equal(first, [0, query + 1 - 5 - (query + 1) // 2])
