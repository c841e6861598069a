"""What the routed mixers share: rotated heads, and a cache of past ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.cache import (
  check_cacheable,
  empty_keys,
  next_positions,
)
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops.positions import rotary
from efficient_attn.values import NonNegative, PositiveFloat

POSITIONS = {'none': False, 'rotary': True}


class Routed(Mixer):
  """Rotation of heads, the way back to the model, and a cache of heads."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    position: str = 'rotary',
    rotary_base: PositiveFloat = 10_000.0,
  ):
    choose('position', position, POSITIONS)
    self.heads = num_heads, d_model // num_heads
    axes = dict(zip(('heads', 'head_dim'), self.heads, strict=True))
    self.out = Projection(axes, {'embed': d_model}, rngs=rngs)
    self.causal = causal
    self.position = position
    self.rotary_base = rotary_base

  def rotation(self, x, positions, cache) -> Callable:
    """How the heads of the new tokens are rotated."""
    if not POSITIONS[self.position]:
      return lambda heads: heads
    if positions is None:
      positions = next_positions(cache, x.shape[1])
    return lambda heads: rotary(heads, positions, base=self.rotary_base)

  def check_cacheable(self, cache, segment_ids=None) -> None:
    """Raises where past keys and values cannot be continued."""
    if cache is not None:
      check_cacheable(self.causal, segment_ids)

  def init_cache(self, batch: int, max_len: int, dtype) -> dict[str, jax.Array]:
    """Returns room for `max_len` keys and values; writing past it is wrong."""
    return empty_keys(batch, max_len, self.heads, dtype)


class GroupedHeads(Routed):
  """Query heads that share key and value heads."""

  def __init__(self, *, num_kv_heads: NonNegative = 0, **options):
    super().__init__(**options)
    num_heads, head_dim = self.heads
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
      raise ConfigError(
        f'num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}'
      )
    self.kv_heads = num_kv_heads, head_dim
    self.qkv = QKV(
      options['d_model'],
      query=self.heads,
      key=self.kv_heads,
      value=self.kv_heads,
      rngs=options['rngs'],
    )

  def project(self, x, positions, cache):
    """Returns query, key and value of the new tokens, rotated."""
    (query, key, value), _ = self.qkv(x)
    rotate = self.rotation(x, positions, cache)
    return rotate(query), rotate(key), value

  def init_cache(self, batch: int, max_len: int, dtype) -> dict[str, jax.Array]:
    """Returns room for `max_len` keys and values; writing past it is wrong."""
    return empty_keys(batch, max_len, self.kv_heads, dtype)


@jax.custom_vjp
def attach(y: jax.Array, loss: jax.Array) -> jax.Array:
  """Returns y [B, T, D]; its gradient is joined by that of `loss` [B, T].

  So what chooses keys, which gets no gradient from the choice, learns from a
  loss of its own beside the model's. Tokens that the model's loss does not
  read do not count.
  """
  del loss
  return y


def _attach_forward(y, loss):
  return y, jnp.zeros((), loss.dtype)


def _attach_backward(zero, dy):
  read = jnp.any(dy != 0, axis=-1)
  return dy, read.astype(zero.dtype)


attach.defvjp(_attach_forward, _attach_backward)


# The leaves of a cache by rank: what heads have is sharded over them.
LEAVES = ('', 'B', 'B_', 'BS_', 'BSK_', 'BSK__')


def shard(op: Callable, layouts: tuple, out: Any = 'BTNV') -> Callable:
  """Runs op(*arrays, cache) -> (out, cache) on the shards of the heads."""

  def leaf(x):
    return LEAVES[x.ndim]

  return sharding.local_op(
    op, (*layouts, leaf), lambda _, cache: (out, jax.tree.map(leaf, cache))
  )
