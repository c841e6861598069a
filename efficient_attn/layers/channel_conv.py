"""The short causal convolution of the Mamba family, over any named axes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.param import fan_in_normal, param, use
from efficient_attn.ops.short_conv import short_conv


class ChannelConv(nnx.Module):
  """silu of a causal depthwise convolution with a bias, [B, T, *channels].

  `channels` names the axes after the first two, {'heads': N, 'head_dim': H} or
  {'state': H}: the convolution runs on shards of 'heads'.
  """

  def __init__(
    self, channels: Mapping[str, int], width: int, *, rngs: nnx.Rngs
  ):
    shape = tuple(channels.values())
    weight = fan_in_normal()(rngs.params(), (width, *shape), width)
    self.weight = param(weight, (None, *channels), weight_decay=False)
    self.bias = param(jnp.zeros(shape), (*channels,))
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

    layout = self.layout
    y, state = sharding.local_op(
      op,
      ('BT' + layout, 'W' + layout, layout, 'BT', 'BT' + layout),
      ('BT' + layout,) * 2,
    )(x, use(self.weight, x.dtype), use(self.bias, x.dtype), segment_ids, state)
    return jax.nn.silu(y), state

  def init_state(self, batch: int, dtype) -> jax.Array:
    """Returns the zero inputs before the first token, [B, width-1, ...]."""
    return jnp.zeros((batch, *self.shape), dtype)
