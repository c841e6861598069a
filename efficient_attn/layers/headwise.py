"""Recurrences over channels: their heads, and block-diagonal maps.

The heads of these mixers are groups of channels; nothing here mixes them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.param import fan_in_normal, param, value_of


def split_heads(channels: int, num_heads: int) -> dict[str, int]:
  """The logical axes of `channels` channels in `num_heads` groups."""
  if channels % num_heads:
    raise ConfigError(
      f'num_heads={num_heads} does not divide the {channels} channels of its '
      'heads; choose a divisor'
    )
  return {'heads': num_heads, 'head_dim': channels // num_heads}


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
    y = op(x, value_of(self.weight, x.dtype))
    return y if self.bias is None else y + value_of(self.bias, x.dtype)
