"""Stacks of blocks whose backward pass stores less than all."""

import functools

import jax
from flax import nnx

from efficient_attn.config import LMConfig
from efficient_attn.layers import reversible as pairs
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


def reversible(periods, x):
  """Layers whose backward pass starts from their outputs alone."""
  return sum(pairs.reversible(mix, feed, periods, (x, x)))
