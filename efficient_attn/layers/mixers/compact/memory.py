"""What the compact mixers share: a memory smaller than keys and values.

  q, c = project(x)      k, v = expand(c)      o = softmax(q k^T / sqrt(H)) v

Only c is kept of past tokens; `attend` expands it, or does without.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from efficient_attn.layers.cache import (
  append,
  check_cacheable,
  next_positions,
)
from efficient_attn.layers.mixer import Mixer
from efficient_attn.ops import masks


class Compact(Mixer):
  """Token mixer [B, T, D] -> [B, T, D] that remembers `widths` of a token.

  A subclass sets both attributes, maps tokens to queries and what is remembered
  (`project`), and attends over what was (`attend`).
  """

  causal: bool
  widths: Mapping[str, tuple[int, ...]]

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    positions = context.positions
    if positions is None:
      positions = next_positions(cache, x.shape[1])
    query, memory = self.project(x, positions)
    offset = 0
    if cache is not None:
      check_cacheable(self.causal, context.segment_ids)
      offset = cache['length']
      memory = {k: append(cache[k], new, offset) for k, new in memory.items()}
      cache = memory | dict(length=offset + x.shape[1])
    mask = masks.Causal(offset) if self.causal else None
    if context.segment_ids is not None:
      mask = masks.packed(mask, context.segment_ids)
    return self.attend(query, memory, mask), cache

  def project(self, x, positions):
    """Returns queries [B, T, N, H] and the memory of the new tokens."""
    raise NotImplementedError

  def attend(self, query, memory, mask):
    """Attends over the memory [B, S, ...] and projects to [B, T, D]."""
    raise NotImplementedError

  def init_cache(self, batch: int, max_len: int, dtype) -> dict[str, jax.Array]:
    """Returns room for `max_len` tokens; writing past it is wrong."""
    empty = {
      name: jnp.zeros((batch, max_len, *width), dtype)
      for name, width in self.widths.items()
    }
    return empty | dict(length=jnp.zeros((), jnp.int32))
