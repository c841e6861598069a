"""Reversible layers: gradients of the plain ones, memory of a single one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.layers.reversible import invert, reversible
from efficient_attn.models import cost


def f(layer, x):
  return jnp.tanh(x @ layer['f'])


def g(layer, x):
  return jnp.sin(x @ layer['g']) * layer['scale']


def made(depth, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  layers = dict(
    f=jax.random.normal(keys[0], (depth, 8, 8), dtype),
    g=jax.random.normal(keys[1], (depth, 8, 8), dtype),
    scale=jax.random.normal(keys[2], (depth,), dtype),
  )
  return layers, tuple(jax.random.normal(k, (4, 8), dtype) for k in keys[3:])


def plain(layers, pair):
  x1, x2 = pair
  for i in range(len(layers['f'])):
    layer = jax.tree.map(lambda p, i=i: p[i], layers)
    x1 = x1 + f(layer, x2)
    x2 = x2 + g(layer, x1)
  return x1, x2


def loss(run):
  def value(layers, pair):
    y1, y2 = run(layers, pair)
    return jnp.sum(y1**2) + jnp.sum(jnp.cos(y2))

  return value


def ours(layers, pair):
  return reversible(f, g, layers, pair)


@pytest.mark.parametrize('depth', [1, 5])
def test_gradients_are_those_of_plain_layers(depth):
  with jax.enable_x64(True):
    args = made(depth, jnp.float64)
    both = [
      jax.value_and_grad(loss(run), (0, 1))(*args) for run in (ours, plain)
    ]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_inputs_follow_from_outputs():
  with jax.enable_x64(True):
    layers, pair = made(12, jnp.float64)
    found = invert(f, g, layers, ours(layers, pair))
    np.testing.assert_allclose(found, pair, atol=1e-10)


def test_memory_does_not_grow_with_depth():
  def stored(run, depth):
    args = made(depth)
    peak = cost.count(jax.grad(loss(run), (0, 1)), *args).peak_bytes
    return peak - cost.array_bytes(args[0])  # the gradients of the parameters

  assert stored(ours, 16) <= 1.1 * stored(ours, 4)
  assert stored(plain, 16) > 2 * stored(plain, 4)
