"""What the compact mixers share: a memory smaller than keys and values.

  q, c = project(x)      k, v = expand(c)      o = softmax(q k^T / sqrt(H)) v

Only c is kept of past tokens; `attend` expands it, or does without.
"""

from collections.abc import Mapping

from efficient_attn.layers.cache import (
  TokenCache,
  positions_of,
  recall,
  restrict,
  token_cache,
)
from efficient_attn.layers.mixer import Mixer
from efficient_attn.ops import masks


class Compact(Mixer):
  """Token mixer [B, T, D] -> [B, T, D] that remembers `widths` of a token.

  A subclass sets `causal` and `widths`, maps tokens to queries and what is
  remembered (`project`), and attends over what was (`attend`).
  """

  widths: Mapping[str, tuple[int, ...]]

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    T = x.shape[1]
    positions = positions_of(context, cache and cache.cursor, T)
    query, memory = self.project(x, positions)
    seen, after, offset = recall(context, cache, **memory)
    mask = masks.Causal(offset) if self.causal else None
    mask = restrict(
      mask, context, cache and cache.cursor, T, offset, seen[0].shape[1]
    )
    memory = dict(zip(memory, seen, strict=True))
    return self.attend(query, memory, mask), after

  def project(self, x, positions):
    """Returns queries [B, T, N, H] and the memory of the new tokens."""
    raise NotImplementedError

  def attend(self, query, memory, mask):
    """Attends over the memory [B, S, ...] and projects to [B, T, D]."""
    raise NotImplementedError

  def init_cache(self, batch: int, max_len: int, dtype) -> TokenCache:
    """Returns room for `max_len` tokens; writing past it is wrong."""
    return token_cache(batch, max_len, dtype, **self.widths)
