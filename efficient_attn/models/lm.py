"""Decoder language model: embed, stack of causal blocks, norm, logits."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import LMConfig
from efficient_attn.layers.cache import Cursor, new_cursor, positions_of
from efficient_attn.layers.context import Context
from efficient_attn.layers.dropout import dropout
from efficient_attn.layers.embed import POSITIONS, Embed
from efficient_attn.layers.norm import NORMS
from efficient_attn.layers.stack import Stack


@chex.dataclass(frozen=True)
class LMCache:
  """What a language model keeps of the tokens so far.

  Attributes:
    layers: the caches of its stack.
    cursor: how many tokens it has seen.
  """

  layers: Any
  cursor: Cursor


class LM(nnx.Module):
  """Maps token ids to the logits of the next token."""

  def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
    self.embed = Embed(config.vocab_size, config.d_model, rngs=rngs)
    if config.position == 'none':
      self.position = None
    else:
      self.position = POSITIONS[config.position](
        config.max_len, config.d_model, rngs=rngs
      )
    self.stack = Stack(config, causal=True, rngs=rngs)
    if config.norm_position == 'pre':
      self.norm = NORMS[config.norm](config.d_model)
    else:  # the last block has normalised already
      self.norm = None
    if config.tie_embeddings:
      self.unembed = None
    else:
      self.unembed = Embed(config.vocab_size, config.d_model, rngs=rngs)
    self.dropout = config.dropout
    self.dtype = jnp.dtype(config.dtype)

  def __call__(
    self, tokens, *, positions=None, segment_ids=None, cache=None, key=None
  ):
    """Runs the model.

    Args:
      tokens: int32 [B, T].
      positions: int32 [T] or [B, T]; default: counted from the cache's end.
      segment_ids: int32 [B, T]; packed sequences do not see each other. With a
        cache, tokens of id 0 in front are padding of rows of unequal length.
      cache: from `init_cache` or an earlier call; None for whole sequences.
      key: PRNG key for dropout; None to not drop.

    Returns:
      float32 logits [B, T, vocab] and the next cache (None without one).
    """
    x, cache = self.hidden(
      tokens,
      positions=positions,
      segment_ids=segment_ids,
      cache=cache,
      key=key,
    )
    return self.head.logits(x), cache

  @property
  def head(self):
    """What maps the vectors of `hidden` to logits."""
    return self.unembed or self.embed

  def hidden(
    self, tokens, *, positions=None, segment_ids=None, cache=None, key=None
  ):
    """Returns what the logits are read from, [B, T, D], and the next cache."""
    context = Context(positions=positions, segment_ids=segment_ids)
    count, cursor = tokens.shape[1], cache and cache.cursor
    x = self.embed(tokens, self.dtype)
    if self.position is not None:
      x = self.position(x, positions_of(context, cursor, count))
    keys = (None, None) if key is None else jax.random.split(key)
    x = dropout(x, self.dropout, keys[0])
    x, layers = self.stack(
      x,
      context,
      cache=cache and cache.layers,
      key=keys[1],
    )
    if self.norm is not None:
      x = self.norm(x)
    if cache is not None:
      cursor = cursor.advance(count, context)
      cache = LMCache(layers=layers, cursor=cursor)
    return x, cache

  def init_cache(self, batch: int, max_len: int):
    """Returns the cache of `batch` empty sequences of at most `max_len`."""
    layers = self.stack.init_cache(batch, max_len, self.dtype)
    return LMCache(layers=layers, cursor=new_cursor())
