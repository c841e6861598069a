"""The short causal convolution many recurrent mixers put before q, k and v."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.param import fan_in_normal, param, use
from efficient_attn.ops.short_conv import short_conv


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
  """silu of a causal depthwise convolution over heads, [B,T,N,H] -> same."""

  def __init__(self, heads: tuple[int, int], width: int, *, rngs: nnx.Rngs):
    weight = fan_in_normal()(rngs.params(), (width, *heads), width)
    axes = (None, 'heads', 'head_dim')
    self.weight = param(weight, axes, weight_decay=False)
    self.shape = (width - 1, *heads)

  def __call__(self, x, *, segment_ids=None, state=None):
    """Returns the convolved x and the last width - 1 inputs."""

    def op(x, weight, segment_ids, state):
      def flat(a):  # heads and their channels as one axis
        return a.reshape(*a.shape[:-2], -1)

      y, state = short_conv(
        flat(x),
        flat(weight),
        segment_ids=segment_ids,
        initial_state=None if state is None else flat(state),
      )
      return y.reshape(x.shape), state.reshape(*state.shape[:2], *x.shape[2:])

    op = sharding.local_op(op, ('BTNH', 'WNH', 'BT', 'BTNH'), ('BTNH', 'BTNH'))
    y, state = op(x, use(self.weight, x.dtype), segment_ids, state)
    return jax.nn.silu(y), state

  def init_state(self, batch: int, dtype) -> jax.Array:
    """Returns the zero inputs before the first token, [B, width-1, N, H]."""
    return jnp.zeros((batch, *self.shape), dtype)
