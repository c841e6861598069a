"""Reversible layers, whose backward pass starts from their outputs alone.

The stream has two halves, as in RevNets (Gomez et al. 1707.04585) and Reformer
(Kitaev et al. 2001.04451, f being attention and g the feed-forward layer):

  y1 = x1 + f(x2),  y2 = x2 + g(y1);    x2 = y2 - g(y1),  x1 = y1 - f(x2)

The gradient computes the inputs of each layer from its outputs, last layer
first, so that what is stored does not grow with depth. It costs one more
forward pass, and rounding: the inputs come back nearly, see `invert`. Such
layers are another function than the same blocks on one stream.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def reversible(f: Callable, g: Callable, layers: Any, pair: Pair) -> Pair:
  """Runs layers over the two halves of a stream.

  Args:
    f: (layer, x) -> an array like x; it may close over no traced array.
    g: likewise.
    layers: pytree of float arrays [layers, ...], as modules of a scan; f and g
      get one layer.
    pair: x1 and x2, of one shape.

  Returns:
    y1 and y2 behind the last layer.
  """

  def step(pair, layer):
    x1, x2 = pair
    y1 = x1 + f(layer, x2)
    return (y1, x2 + g(layer, y1)), None

  return jax.lax.scan(step, pair, layers)[0]


def invert(f: Callable, g: Callable, layers: Any, pair: Pair) -> Pair:
  """Returns the inputs of `reversible` from its outputs, up to rounding."""

  def step(pair, layer):
    y1, y2 = pair
    x2 = y2 - g(layer, y1)
    return (y1 - f(layer, x2), x2), None

  return jax.lax.scan(step, pair, layers, reverse=True)[0]


def _forward(f, g, layers, pair):
  pair = reversible(f, g, layers, pair)
  return pair, (layers, pair)


def _backward(f, g, kept, gradient):
  def step(carry, layer):
    (y1, y2), (d1, d2) = carry
    added, pull_g = jax.vjp(g, layer, y1)
    x2 = y2 - added
    added, pull_f = jax.vjp(f, layer, x2)
    of_g, more = pull_g(d2)
    d1 = d1 + more
    of_f, more = pull_f(d1)
    grads = jax.tree.map(jnp.add, of_f, of_g)
    return ((y1 - added, x2), (d1, d2 + more)), grads

  layers, pair = kept
  carry = pair, gradient
  (_, gradient), grads = jax.lax.scan(step, carry, layers, reverse=True)
  return grads, gradient


reversible.defvjp(_forward, _backward)
