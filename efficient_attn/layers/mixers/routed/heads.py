"""What the routed mixers share: rotated heads, and a cache of past ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.cache import TokenCache, positions_of, token_cache
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops.positions import rotary
from efficient_attn.values import NonNegative, PositiveFloat

POSITIONS = {'none': False, 'rotary': True}


class Routed(Mixer):
  """Rotation of heads, the way back to the model, and a cache of heads."""

  # Most cut a row into blocks or buckets.
  packing = left_padding = False

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
    self.heads = self.kv_heads = num_heads, d_model // num_heads
    axes = dict(zip(('heads', 'head_dim'), self.heads, strict=True))
    self.out = Projection(axes, {'embed': d_model}, rngs=rngs)
    self.causal = causal
    self.position = position
    self.rotary_base = rotary_base

  def rotation(self, x, context, cache) -> Callable:
    """How the heads of the new tokens are rotated."""
    if not POSITIONS[self.position]:
      return lambda heads: heads
    positions = positions_of(context, cache and cache.cursor, x.shape[1])
    return lambda heads: rotary(heads, positions, base=self.rotary_base)

  def init_cache(self, batch: int, max_len: int, dtype, **more) -> TokenCache:
    """Returns room for `max_len` tokens; writing past it is wrong.

    A token has a key, a value and what `more` says, as `token_cache` takes it.
    """
    heads = self.kv_heads
    return token_cache(batch, max_len, dtype, key=heads, value=heads, **more)


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

  def project(self, x, context, cache):
    """Returns query, key and value of the new tokens, rotated."""
    (query, key, value), _ = self.qkv(x)
    rotate = self.rotation(x, context, cache)
    return rotate(query), rotate(key), value


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


def token_op(op: Callable, *layouts: str) -> Callable:
  """Shards the choice of single tokens: (out, loss) of heads and `layouts`."""
  return sharding.local_op(
    op,
    ('BTNH', 'BSKH', 'BSKV', *layouts),
    ('BTNV', 'BTN'),
    offset='',
    segment_ids='BT',
    starts='BT',
  )


def spans(context, cache, offset, count: int) -> dict[str, Any]:
  """Returns the options of such an op that say what a token may see."""
  if cache is None:
    return dict(offset=offset, segment_ids=context.segment_ids)
  return dict(offset=offset, starts=cache.cursor.starts(context, count))
