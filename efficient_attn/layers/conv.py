"""The short causal convolution many recurrent mixers put before q, k and v."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.context import Context
from efficient_attn.layers.param import param, value_of
from efficient_attn.ops.recurrent.short_conv import short_conv


def conv_taps(conv_width: int | None, causal: bool) -> int:
  """The width of a mixer's short convolution; 0 is none.

  None is the published one: 4, and none in an encoder, because it is causal.
  """
  if conv_width is None:
    return 4 if causal else 0
  if conv_width and not causal:
    raise ConfigError(
      f'conv_width={conv_width} is causal: use conv_width=0 in an encoder'
    )
  return conv_width


class ShortConv(nnx.Module):
  """Causal depthwise convolution, [B, T, *channels] -> same; silu by default.

  `channels` names the axes after the first two, {'heads': N, 'head_dim': H} or
  {'state': H}: the convolution runs on shards of 'heads'. Weight and bias
  start uniform in +-1 / sqrt(width).
  """

  def __init__(
    self,
    channels: Mapping[str, int],
    width: int,
    *,
    bias: bool = False,
    activation: Callable | None = jax.nn.silu,
    rngs: nnx.Rngs,
  ):
    if width < 1:
      raise ConfigError(f'conv_width={width}: use 1 or more tokens')

    def uniform(*shape):
      bound = 1 / math.sqrt(width)
      return jax.random.uniform(
        rngs.params(), shape, minval=-bound, maxval=bound
      )

    shape = tuple(channels.values())
    self.weight = param(
      uniform(width, *shape), (None, *channels), weight_decay=False
    )
    self.bias = param(uniform(*shape), (*channels,)) if bias else None
    self.activation = activation
    self.shape = (width - 1, *shape)
    self.layout = ''.join('N' if n == 'heads' else 'D' for n in channels)

  def __call__(self, x, *, segment_ids=None, state=None):
    """Returns the convolved x and the last width - 1 inputs."""

    def flat(a, lead):
      return None if a is None else a.reshape(*a.shape[:lead], -1)

    def op(x, weight, bias, segment_ids, state):
      y, last = short_conv(
        flat(x, 2),
        flat(weight, 1),
        bias=flat(bias, 0),
        segment_ids=segment_ids,
        initial_state=flat(state, 2),
      )
      return y.reshape(x.shape), last.reshape(*last.shape[:2], *x.shape[2:])

    tokens = 'BT' + self.layout
    op = sharding.local_op(
      op,
      (tokens, 'W' + self.layout, self.layout, 'BT', tokens),
      (tokens, tokens),
    )
    bias = None if self.bias is None else value_of(self.bias, x.dtype)
    y, state = op(x, value_of(self.weight, x.dtype), bias, segment_ids, state)
    return y if self.activation is None else self.activation(y), state

  def init_state(self, batch: int, dtype) -> jax.Array:
    """Returns the zero inputs before the first token, [B, width-1, ...]."""
    return jnp.zeros((batch, *self.shape), dtype)


def convolve(
  convs: Sequence[ShortConv],
  inputs: Sequence[jax.Array],
  context: Context | None,
  tails: Sequence[jax.Array] | None,
) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
  """Returns each input after its convolution, and the tails of all.

  The tails are the last inputs, of a call before or None.
  """
  done = [
    conv(x, segment_ids=context and context.segment_ids, state=tail)
    for conv, x, tail in zip(
      convs, inputs, tails or (None,) * len(convs), strict=True
    )
  ]
  return [y for y, _ in done], tuple(tail for _, tail in done)
