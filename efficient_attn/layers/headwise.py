"""Layers of recurrences over channels: convolution, block-diagonal maps.

The heads of these mixers are groups of channels; nothing here mixes them.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.param import fan_in_normal, param, use
from efficient_attn.ops.short_conv import short_conv


def split_heads(channels: int, num_heads: int) -> dict[str, int]:
  """The logical axes of `channels` channels in `num_heads` groups."""
  if channels % num_heads:
    raise ConfigError(
      f'num_heads={num_heads} does not divide the {channels} channels of the '
      'recurrence; choose a divisor'
    )
  return {'heads': num_heads, 'head_dim': channels // num_heads}


class ChannelConv(nnx.Module):
  """Causal depthwise convolution with bias, [B, T, N, H] -> same.

  No activation; weight and bias are uniform in +-1 / sqrt(width).
  """

  def __init__(self, heads: tuple[int, int], width: int, *, rngs: nnx.Rngs):
    if width < 1:
      raise ConfigError(f'conv_width={width}: use 1 or more tokens')

    def uniform(*shape):
      bound = 1 / math.sqrt(width)
      return jax.random.uniform(
        rngs.params(), shape, minval=-bound, maxval=bound
      )

    axes = ('heads', 'head_dim')
    self.weight = param(
      uniform(width, *heads), (None, *axes), weight_decay=False
    )
    self.bias = param(uniform(*heads), axes)
    self.shape = (width - 1, *heads)

  def __call__(self, x, *, segment_ids=None, state=None):
    """Returns the convolved x and the last width - 1 inputs."""

    def flat(a):  # heads and their channels as one axis
      return None if a is None else a.reshape(*a.shape[:-2], -1)

    def op(x, weight, bias, segment_ids, state):
      y, state = short_conv(
        flat(x),
        flat(weight),
        bias=flat(bias),
        segment_ids=segment_ids,
        initial_state=flat(state),
      )
      return y.reshape(x.shape), state.reshape(*state.shape[:2], *x.shape[2:])

    op = sharding.local_op(
      op, ('BTNH', 'WNH', 'NH', 'BT', 'BTNH'), ('BTNH', 'BTNH')
    )
    weight, bias = use(self.weight, x.dtype), use(self.bias, x.dtype)
    return op(x, weight, bias, segment_ids, state)

  def init_state(self, batch: int, dtype) -> jax.Array:
    """Returns the zero inputs before the first token, [B, width-1, N, H]."""
    return jnp.zeros((batch, *self.shape), dtype)


class Headwise(nnx.Module):
  """A square matrix for each head: [B, T, N, H] -> same."""

  def __init__(
    self, heads: int, head_dim: int, *, bias: bool = False, rngs: nnx.Rngs
  ):
    shape = (heads, head_dim, head_dim)
    weight = fan_in_normal()(rngs.params(), shape, head_dim)
    axes = ('heads', 'head_dim', None)
    self.weight = param(weight, axes, weight_decay=True)
    self.bias = param(jnp.zeros(shape[:2]), axes[:2]) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps every head of x [B, T, N, H] by its own matrix."""

    def op(x, weight):
      return jnp.einsum('btnh,nhv->btnv', x, weight)

    op = sharding.local_op(op, ('BTNH', 'NHV'), 'BTNV')
    y = op(x, use(self.weight, x.dtype))
    return y if self.bias is None else y + use(self.bias, x.dtype)
