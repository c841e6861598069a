"""Stacks of blocks whose backward pass stores less than all."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import LMConfig
from efficient_attn.layers.context import Context
from efficient_attn.layers.stack import Period, Stack


def config(layers: int, width=256, dtype='float32', **options) -> LMConfig:
  """A stack of plain blocks."""
  return LMConfig(
    d_model=width, num_layers=layers, num_heads=4, dtype=dtype, **options
  )


def stack(layers: int, **options) -> Stack:
  """The same with shapes in place of arrays."""
  return nnx.eval_shape(
    lambda: Stack(config(layers, **options), causal=True, rngs=nnx.Rngs(0))
  )


run = functools.partial(Period.__call__, context=Context())


def layer(x, period):
  """One layer as the body of a scan."""
  return run(period, x, None, None)[0], None


def scanned(periods, x):
  """Everything is stored, or what the config's `remat` says."""
  return jax.lax.scan(layer, x, periods)[0]


def segments(periods, x):
  """Stored are the inputs of segments of layers: [segments, layers, ...]."""
  part = jax.checkpoint(lambda x, p: jax.lax.scan(layer, x, p))
  return jax.lax.scan(part, x, periods)[0]


@jax.custom_vjp
def nothing(periods, x):
  """Nothing is stored: each layer's input is computed from the first."""
  for period in periods:
    x = layer(x, period)[0]
  return x


def _nothing_backward(kept, d):
  periods, x = kept
  grads = []
  for i in reversed(range(len(periods))):
    _, pull = jax.vjp(
      lambda x, p: layer(x, p)[0], nothing(periods[:i], x), periods[i]
    )
    d, grad = pull(d)
    grads.insert(0, grad)
  return grads, d


nothing.defvjp(lambda *args: (nothing(*args), args), _nothing_backward)


def mix(period, x):
  """The f of a reversible layer."""
  (block,) = period.blocks
  return block.mixer(block.mixer_norm(x))[0]


def feed(period, x):
  """The g of a reversible layer."""
  (block,) = period.blocks
  return block.ffn(block.ffn_norm(x))


def ahead(pair, period):
  """y1 = x1 + f(x2), y2 = x2 + g(y1)."""
  x1, x2 = pair
  y1 = x1 + mix(period, x2)
  return (y1, x2 + feed(period, y1)), None


def back(pair, period):
  """x2 = y2 - g(y1), x1 = y1 - f(x2)."""
  y1, y2 = pair
  x2 = y2 - feed(period, y1)
  return (y1 - mix(period, x2), x2), None


@jax.custom_vjp
def reversible(periods, x):
  """Layers whose backward pass starts from their outputs alone."""
  pair, _ = jax.lax.scan(ahead, (x, x), periods)
  return pair[0] + pair[1]


def _forward(periods, x):
  pair, _ = jax.lax.scan(ahead, (x, x), periods)
  return pair[0] + pair[1], (periods, pair)


def _backward(kept, d):
  periods, pair = kept

  def step(carry, period):
    (y1, y2), (d1, d2) = carry
    g, pull_g = jax.vjp(feed, period, y1)
    x2 = y2 - g
    f, pull_f = jax.vjp(mix, period, x2)
    of_g, more = pull_g(d2)
    d1 = d1 + more
    of_f, more = pull_f(d1)
    grads = jax.tree.map(jnp.add, of_f, of_g)
    return ((y1 - f, x2), (d1, d2 + more)), grads

  (_, (d1, d2)), grads = jax.lax.scan(
    step, (pair, (d, d)), periods, reverse=True
  )
  return grads, d1 + d2


reversible.defvjp(_forward, _backward)
