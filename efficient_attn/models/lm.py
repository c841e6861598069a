"""Decoder language model: embed, stack of causal blocks, norm, logits."""

import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import LMConfig, LogitsConfig
from efficient_attn.layers.cache import new_cursor
from efficient_attn.layers.context import Context
from efficient_attn.layers.embed import Embed, Head
from efficient_attn.layers.param import param
from efficient_attn.models.trunk import LMCache, Trunk


class LM(Trunk):
  """Maps token ids to the logits of the next token."""

  def __init__(
    self,
    config: LMConfig,
    *,
    causal: bool = True,
    embed_dim: int = 0,
    rngs: nnx.Rngs,
    **parts: bool,
  ):
    width = embed_dim or config.d_model
    self.embed = Embed(
      config.vocab_size, width, scale=config.embedding.scale, rngs=rngs
    )
    super().__init__(
      config, causal=causal, embed_dim=embed_dim, rngs=rngs, **parts
    )
    if config.tie_embeddings:
      self.unembed = None
    else:
      self.unembed = Embed(config.vocab_size, width, rngs=rngs)
    self.logits = config.logits
    bias = param(jnp.zeros(config.vocab_size), ('vocab',))
    self.logit_bias = bias if config.logits.bias else None

  def __call__(self, *args, **options):
    """Returns float32 logits [B, T, vocab] and the next cache; see `hidden`."""
    x, cache = self.hidden(*args, **options)
    return self.head.logits(x), cache

  @property
  def head(self):
    """What maps the vectors of `hidden` to logits."""
    table = self.unembed or self.embed
    if self.logits == LogitsConfig():
      return table
    return Head(table, self.logits, self.logit_bias)

  def hidden(
    self, tokens, *, positions=None, segment_ids=None, cache=None, key=None
  ):
    """Returns what the logits are read from, [B, T, D], and the next cache.

    Args:
      tokens: int32 [B, T].
      positions: int32 [T] or [B, T]; default: counted from the start of each
        segment, which a cache may have seen.
      segment_ids: int32 [B, T]; packed sequences do not see each other. With a
        cache, tokens of id 0 in front are padding of rows of unequal length.
      cache: from `init_cache` or an earlier call; None for whole sequences.
      key: PRNG key for dropout; None to not drop.
    """
    context = Context(positions=positions, segment_ids=segment_ids)
    return self.run(self.embed(tokens, self.dtype), context, cache, key)

  def init_cache(self, batch: int, max_len: int):
    """Returns the cache of `batch` empty sequences of at most `max_len`."""
    layers = self.stack.init_cache(batch, max_len, self.dtype)
    return LMCache(layers=layers, cursor=new_cursor())
