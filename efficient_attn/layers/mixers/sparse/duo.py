"""DuoAttention (Xiao et al. 2410.10819): full heads and streaming heads.

  o_t = alpha_n full_t + (1 - alpha_n) streaming_t

for kv head n, where streaming reads the first `num_sinks` tokens and the last
`window`. The gates alpha_n, clipped to [0, 1] with a gradient of 1, start at 1;
the paper trains them alone, on loss + lambda sum_n alpha_n, where lambda, here
`penalty_weight`, is 0.05. Then the kv heads are ordered by their gates, and the
first `full_heads` are full while the others stream and keep num_sinks + window
- 1 keys and values. O(T^2); without gates for the full heads alone.
"""

import jax
import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.cache import (
  Cursor,
  recall,
  token_cache,
  window_cache,
)
from efficient_attn.layers.mixer import refuse_segments
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.layers.param import clip_to_unit, param, value_of
from efficient_attn.ops import masks
from efficient_attn.values import NonNegative, NonNegativeFloat, Positive


class Streaming(MaskRule):
  """The first tokens and the last."""

  takes_bias = False  # one would need to know where the keys of a head stand

  def __init__(
    self, *, window: Positive = 256, num_sinks: NonNegative = 64, **told
  ):
    super().__init__(**told)
    self.window = window
    self.num_sinks = num_sinks

  def mask(self, count):
    """Returns the mask of `count` keys."""
    return masks.streaming(self.num_sinks, self.window)


class DuoAttention(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    full_heads: Positive | None = None,
    penalty_weight: NonNegativeFloat = 0.0,
    **options,
  ):
    super().__init__(**options)
    kv_heads = self.kv_heads[0]
    if full_heads is None:
      self.alpha = param(jnp.ones(kv_heads), ('heads',), weight_decay=False)
    elif full_heads < kv_heads:
      self.alpha = None
    else:
      raise ConfigError(
        f'full_heads={full_heads} must be more than 0 and less than the'
        f' {kv_heads} kv heads; without gates use attention or window'
      )
    self.full_heads = full_heads
    self.penalty_weight = penalty_weight
    self.shares_keys = False
    self.left_padding = full_heads is None

  def penalty(self):
    """What the gates add to the objective."""
    if self.alpha is None:
      return 0.0
    # Not past the ends: nothing there would hold them.
    return self.penalty_weight * jnp.sum(jnp.clip(self.alpha[...], 0, 1))

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    cursor = cache and self.cursor(cache)
    heads = self.project(x, context, cursor)
    mix = self.split if self.alpha is None else self.gated
    o, cache = mix(*heads, context, cache)
    return self.output(o, x), cache

  def cursor(self, cache) -> Cursor:
    """Where the parts of a cache stand."""
    return cache.cursor if self.alpha is not None else cache['full'].cursor

  def gated(self, query, key, value, context, cache):
    """Every head both ways, mixed by its gate."""
    cursor, T = cache and cache.cursor, query.shape[1]
    (key, value), cache, offset = recall(context, cache, key=key, value=value)
    S = key.shape[1]
    full, streaming = (
      self.weights(query, key, value, mask, None, self.scale)
      for mask in (
        self.mask(rule, context, cursor, offset, T, S)
        for rule in (None, self.mask_rule.mask(S))
      )
    )

    def op(full, streaming, alpha):
      alpha = clip_to_unit(alpha)
      alpha = jnp.repeat(alpha, full.shape[2] // alpha.size)[:, None]
      return (alpha * full + (1 - alpha) * streaming).astype(full.dtype)

    op = sharding.local_op(op, ('BTNV', 'BTNV', 'K'), 'BTNV')
    return op(full, streaming, value_of(self.alpha, jnp.float32)), cache

  def split(self, query, key, value, context, cache):
    """The first heads one way, the others the other way."""
    heads = [
      sharding.constrain(x, 'batch', None, None, None)
      for x in (query, key, value)
    ]
    cuts = [self.full_heads * x.shape[2] // self.kv_heads[0] for x in heads]
    full = [x[:, :, :cut] for x, cut in zip(heads, cuts, strict=True)]
    rest = [x[:, :, cut:] for x, cut in zip(heads, cuts, strict=True)]
    past = cache or dict(full=None, first=None, last=None)
    (key, value), past['full'], offset = recall(
      context, past['full'], key=full[1], value=full[2]
    )
    mask = masks.Causal(offset)
    if cache is None and context.segment_ids is not None:
      mask = masks.packed(mask, context.segment_ids)
    reads = [
      self.weights(full[0], key, value, mask, None, self.scale),
      self.stream(*rest, context, past),
    ]
    return jnp.concatenate(reads, axis=2), cache and past

  def stream(self, query, key, value, context, past):
    """Causal attention to the first tokens and the last; renews `past`."""
    rule = masks.Causal() & self.mask_rule.mask(key.shape[1])
    if past['last'] is None:
      if context.segment_ids is not None:
        rule = masks.packed(rule, context.segment_ids)
      return self.weights(query, key, value, rule, None, self.scale)
    refuse_segments('duo with full_heads and a cache', context)
    # Where the sinks, the last tokens and the new ones stand. What is not yet
    # there, or a sink among the last tokens, does not count.
    T, length = query.shape[1], past['last'].cursor.length
    count, window = self.mask_rule.num_sinks, self.mask_rule.window
    sinks, new = jnp.arange(count), length + jnp.arange(T)
    last = length - jnp.arange(window - 1, 0, -1)
    places = jnp.concatenate([sinks, last, new])
    real = jnp.concatenate([sinks < length, last >= count, new >= length])
    mask = masks.At(rule, new[None], places[None])
    mask &= masks.Dense(real[None, None, None])
    first, tokens = past['first'], dict(key=key, value=value)
    joined, past['last'] = past['last'].append(context, **tokens)
    past['first'] = {
      name: fill(buffer, tokens[name], length) for name, buffer in first.items()
    }
    key, value = (
      jnp.concatenate([first[name], joined[name]], axis=1) for name in tokens
    )
    return self.weights(query, key, value, mask, None, self.scale)

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens of the heads that are full."""
    if self.alpha is not None:
      return super().init_cache(batch, max_len, dtype)
    heads, width = self.kv_heads
    full = dict.fromkeys(('key', 'value'), (self.full_heads, width))
    rest = dict.fromkeys(('key', 'value'), (heads - self.full_heads, width))
    first = token_cache(batch, self.mask_rule.num_sinks, dtype, **rest)
    return dict(
      full=token_cache(batch, max_len, dtype, **full),
      first=first.buffers,
      last=window_cache(batch, self.mask_rule.window - 1, dtype, **rest),
    )


def fill(buffer, new, length):
  """Writes new tokens behind `length` others, as far as there is room."""
  size, T = buffer.shape[1], new.shape[1]
  room = jnp.pad(buffer, ((0, 0), (0, T), (0, 0), (0, 0)))
  room = jax.lax.dynamic_update_slice_in_dim(
    room, new.astype(buffer.dtype), jnp.minimum(length, size), axis=1
  )
  return room[:, :size]
