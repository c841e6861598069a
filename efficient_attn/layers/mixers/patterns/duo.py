"""DuoAttention (Xiao et al. 2410.10819): full heads and streaming heads.

  o_t = alpha_n full_t + (1 - alpha_n) streaming_t

for kv head n, where streaming reads the first `num_sinks` tokens and the last
`window`. The gates alpha_n, clipped to [0, 1] with a gradient of 1, start at 1;
the paper trains them alone, on loss + lambda sum_n alpha_n, where lambda, here
`penalty_weight`, is 0.05. Then the kv heads are ordered by their gates, and the
first `full_heads` are full while the others stream and keep num_sinks + window
- 1 keys and values. O(T^2); without gates for the full heads alone.
"""

import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.cache import append, extend
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.param import clip_to_unit, param, use
from efficient_attn.ops import masks
from efficient_attn.values import NonNegative, NonNegativeFloat, Positive


class DuoAttention(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    window: Positive = 256,
    num_sinks: NonNegative = 64,
    full_heads: Positive | None = None,
    penalty_weight: NonNegativeFloat = 0.0,
    position: str = 'rotary',
    sinks: bool = False,
    **options,
  ):
    # The rest would need to know where the keys of a head stand.
    choose('position', position, {'none': 0, 'rotary': 1})
    if sinks:
      raise ConfigError('sinks=True is not an option of duo; see num_sinks')
    super().__init__(position=position, **options)
    kv_heads = self.kv_heads[0]
    if full_heads is None:
      self.alpha = param(jnp.ones(kv_heads), ('heads',), weight_decay=False)
    elif 0 < full_heads < kv_heads:
      self.alpha = None
    else:
      raise ConfigError(
        f'full_heads={full_heads} must be more than 0 and less than the'
        f' {kv_heads} kv heads; without gates use attention or window'
      )
    self.window = window
    self.num_sinks = num_sinks
    self.full_heads = full_heads
    self.penalty_weight = penalty_weight

  mix_sharing = None  # its keys and values are not those of attention

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    heads = self.project(x, context.positions, cache)
    if cache is not None:
      self.check_cacheable(context.segment_ids)
    if self.alpha is not None:
      o, cache = self.mix_gated(*heads, context.segment_ids, cache)
      return self.output(o, x), cache
    reads, after = [], {}
    for part, run in (('full', self.read_all), ('streaming', self.stream)):
      past = cache and dict(cache[part], length=cache['length'])
      o, after[part] = run(*self.part(part, *heads), context.segment_ids, past)
      reads.append(o)
    if cache is not None:
      cache = dict(after, length=cache['length'] + x.shape[1])
    return self.output(jnp.concatenate(reads, axis=2), x), cache

  def mix_gated(self, query, key, value, segment_ids, cache):
    """Every head both ways, mixed by its gate."""
    near = masks.streaming(self.num_sinks, self.window)
    key, value, cache, offset = extend(cache, key, value)
    if cache is not None:
      rows = offset + jnp.arange(query.shape[1])
      cols = jnp.arange(key.shape[1])
      near = masks.At(near, rows[None], cols[None])
    mask = masks.Causal(offset)
    if segment_ids is not None:
      near = masks.packed(near, segment_ids)
      mask = masks.packed(mask, segment_ids)
    full = self.read(query, key, value, mask, offset)
    streaming = self.read(query, key, value, mask & near, offset)

    def op(full, streaming, alpha):
      alpha = clip_to_unit(alpha)
      alpha = jnp.repeat(alpha, full.shape[2] // alpha.size)[:, None]
      return (alpha * full + (1 - alpha) * streaming).astype(full.dtype)

    op = sharding.local_op(op, ('BTNV', 'BTNV', 'K'), 'BTNV')
    return op(full, streaming, use(self.alpha, jnp.float32)), cache

  def penalty(self):
    """What the gates add to the objective."""
    if self.alpha is None:
      return 0.0
    # Not past the ends: nothing there would hold them.
    return self.penalty_weight * jnp.sum(jnp.clip(self.alpha[...], 0, 1))

  def part(self, name, *heads):
    """The query, key and value heads that are full, or that stream."""
    for x in heads:
      x = sharding.constrain(x, 'batch', None, None, None)
      cut = self.full_heads * x.shape[2] // self.kv_heads[0]
      yield x[:, :, :cut] if name == 'full' else x[:, :, cut:]

  def read_all(self, query, key, value, segment_ids, cache):
    """Causal attention to everything."""
    key, value, cache, offset = extend(cache, key, value)
    if cache is not None:
      del cache['length']  # one for both parts
    mask = masks.Causal(offset)
    if segment_ids is not None:
      mask = masks.packed(mask, segment_ids)
    return self.read(query, key, value, mask, offset), cache

  def stream(self, query, key, value, segment_ids, cache):
    """Causal attention to the first tokens and the last."""
    rule = masks.Causal() & masks.streaming(self.num_sinks, self.window)
    if segment_ids is not None:
      rule = masks.packed(rule, segment_ids)
    if cache is None:
      return self.read(query, key, value, rule, 0), None
    # Where the sinks, the last tokens and the new ones stand. What is not yet
    # there, or a sink among the last tokens, does not count.
    T, length = query.shape[1], cache['length']
    sinks, new = jnp.arange(self.num_sinks), length + jnp.arange(T)
    last = length - jnp.arange(self.window - 1, 0, -1)
    positions = jnp.concatenate([sinks, last, new])
    counts = jnp.concatenate(
      [sinks < length, last >= self.num_sinks, new >= length]
    )
    mask = masks.At(rule, new[None], positions[None])
    mask &= masks.Dense(counts[None, None, None])
    joined, after = {}, {}
    for name, x in (('key', key), ('value', value)):
      first, recent = cache[f'first_{name}'], cache[name]
      x = x.astype(recent.dtype)
      joined[name] = jnp.concatenate([first, recent, x], axis=1)
      after[name] = jnp.concatenate([recent, x], axis=1)[:, T:]
      room = jnp.pad(first, ((0, 0), (0, T), (0, 0), (0, 0)))
      room = append(room, x, jnp.minimum(length, self.num_sinks))
      after[f'first_{name}'] = room[:, : self.num_sinks]
    return self.read(query, joined['key'], joined['value'], mask, 0), after

  def init_cache(self, batch: int, max_len: int, dtype) -> dict:
    """Returns room for `max_len` tokens; writing past it is wrong."""
    if self.alpha is not None:
      return super().init_cache(batch, max_len, dtype)
    heads, width = self.kv_heads

    def empty(length, heads):
      return jnp.zeros((batch, length, heads, width), dtype)

    full, streaming = self.full_heads, heads - self.full_heads
    return dict(
      full={name: empty(max_len, full) for name in ('key', 'value')},
      streaming={
        name: empty(length, streaming)
        for name, length in (
          ('key', self.window - 1),
          ('value', self.window - 1),
          ('first_key', self.num_sinks),
          ('first_value', self.num_sinks),
        )
      },
      length=jnp.zeros((), jnp.int32),
    )
