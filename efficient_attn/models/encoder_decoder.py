"""Encoder and decoder with cross-attention (Vaswani et al. 1706.03762).

The encoder is a bidirectional trunk over source tokens, the decoder a language
model that predicts the next target token from the targets before it and from
all sources; its blocks are

  x = x + mixer(norm(x));  x = x + cross(norm(x), memory);  x = x + ffn(norm(x))

with any mixer of the table in either half, and one table of embeddings. What
the cross-attention needs of the source, its keys and values, is computed once
and is part of the cache. Sources and targets packed in rows are kept apart by
their segment ids: a target reads the sources of its own id.
"""

import jax
from flax import nnx

from efficient_attn.config import ConfigError, EncoderDecoderConfig
from efficient_attn.layers.cache import new_cursor
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers import choose_mixer
from efficient_attn.layers.stack import row_of
from efficient_attn.models.lm import LM
from efficient_attn.models.trunk import LMCache, Trunk


class EncoderDecoder(LM):
  """Maps target ids, beside source ids, to the logits of the next target."""

  def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
    for name in config.encoder.pattern:
      if not choose_mixer('model.encoder_pattern', row_of(name)).bidirectional:
        raise ConfigError(
          f'model.encoder_pattern={config.encoder_pattern}: {name!r} is causal '
          'only, and an encoder reads both ways; give encoder_pattern another '
          "mixer, as 'attention'"
        )
    super().__init__(config, cross=True, rngs=rngs)
    self.encoder = Trunk(config.encoder, causal=False, rngs=rngs)

  def encode(self, source, *, source_ids=None, key=None):
    """Maps ids [B, S] to the memory [B, S, D]; arguments as for `hidden`."""
    x = self.embed(source, self.dtype)
    return self.encoder.run(x, Context(segment_ids=source_ids), key=key)[0]

  def hidden(
    self,
    tokens,
    source=None,
    *,
    source_ids=None,
    positions=None,
    segment_ids=None,
    cache=None,
    key=None,
  ):
    """Returns what the logits are read from, [B, T, D], and the next cache.

    Args:
      tokens: int32 [B, T], the targets so far.
      source: int32 [B, S]; not needed with a cache.
      source_ids: int32 [B, S], segments of the source, 0 for padding.
      positions: of the targets, as for `LM`.
      segment_ids: int32 [B, T], segments of the targets: with packed sources
        those of the pairs, with a cache 0 for padding in front.
      cache: from `init_cache` or an earlier call; None for whole sequences.
      key: PRNG key for dropout; None to not drop.
    """
    if (source is None) == (cache is None):
      raise ValueError('give either the source or a cache, which has read it')
    keys = (None, None) if key is None else jax.random.split(key)
    memory = None
    if cache is None:
      memory = self.encode(source, source_ids=source_ids, key=keys[0])
    context = Context(
      positions=positions,
      segment_ids=segment_ids,
      memory=memory,
      memory_ids=source_ids,
    )
    return self.run(self.embed(tokens, self.dtype), context, cache, keys[1])

  def init_cache(self, source, max_len: int, *, source_ids=None):
    """Returns the cache of no targets yet and of one source a row.

    Args:
      source: int32 [B, S].
      max_len: of the targets.
      source_ids: int32 [B, S], 0 for padding.
    """
    memory = self.encode(source, source_ids=source_ids)
    context = Context(memory=memory, memory_ids=source_ids)
    layers = self.stack.init_cache(
      source.shape[0], max_len, self.dtype, context
    )
    return LMCache(layers=layers, cursor=new_cursor())
