"""Sliding-window softmax attention (Beltagy et al. 2020; Mistral 7B).

  o_t = sum_{s in W(t)} softmax_s(q_t . k_s / sqrt(H)) v_s

A causal window of `window` tokens is the token itself and the window - 1 before
it; a bidirectional one reaches window // 2 tokens to each side. The cache holds
the last window - 1 keys and values, whatever the length.
"""

import jax
import jax.numpy as jnp

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.ops import masks
from efficient_attn.values import Positive


class Window(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, *, window: Positive = 128, **options):
    super().__init__(**options)
    if window < 1:
      raise ConfigError(f'window={window} must be at least 1')
    self.window = window

  mix_sharing = None  # its keys and values are not those of attention

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    query, key, value = self.project(x, context.positions, cache)
    left, right = self.window - 1, 0
    if not self.causal:
      left = right = self.window // 2
    mask, offset = masks.Window(left, right), 0
    if cache is not None:
      self.check_cacheable(context.segment_ids)
      # Key 0 of the joined keys stands `left` tokens before query 0.
      offset = left
      key = jnp.concatenate([cache['key'], key.astype(cache['key'].dtype)], 1)
      value = jnp.concatenate(
        [cache['value'], value.astype(cache['value'].dtype)], 1
      )
      filled = jnp.arange(key.shape[1]) >= left - cache['length']
      mask = masks.Window(left, right, offset) & masks.Dense(
        filled[None, None, None, :]
      )
      cache = dict(
        key=key[:, x.shape[1] :],
        value=value[:, x.shape[1] :],
        length=cache['length'] + x.shape[1],
      )
    if context.segment_ids is not None:
      mask = masks.packed(mask, context.segment_ids)
    return self.attend(query, key, value, mask, offset, x), cache

  def init_cache(self, batch: int, max_len: int, dtype) -> dict[str, jax.Array]:
    """Returns the cache of an empty past; `max_len` does not matter."""
    return super().init_cache(batch, self.window - 1, dtype)
