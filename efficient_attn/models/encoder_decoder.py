"""Encoder and decoder with cross-attention (Vaswani et al. 1706.03762).

The encoder is a bidirectional stack over source tokens, the decoder predicts
the next target token from the targets before it and from all sources:

  x = x + mixer(norm(x));  x = x + cross(norm(x), memory);  x = x + ffn(norm(x))

with any mixer of the table in either half. What the cross-attention needs of
the source, its keys and values, is computed once and is part of the cache.
Decoder layers are unrolled.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.layers.context import Context
from efficient_attn.layers.cross_attention import CrossAttention
from efficient_attn.layers.dropout import dropout
from efficient_attn.layers.embed import POSITIONS, Embed
from efficient_attn.layers.norm import NORMS
from efficient_attn.layers.stack import Block, Stack


class EncoderDecoder(nnx.Module):
  """Maps source and target ids to the logits of the next target.

  Args:
    config: of the decoder; its vocabulary serves both halves.
    encoder: of the encoder, by default the same; only what a stack needs and
      the positions count.
    rngs: of the parameters.
  """

  def __init__(
    self, config: LMConfig, encoder: LMConfig | None = None, *, rngs: nnx.Rngs
  ):
    encoder = encoder or config
    if encoder.d_model != config.d_model:
      raise ConfigError(
        f'the encoder has d_model={encoder.d_model} and the decoder '
        f'{config.d_model}; make them equal'
      )

    def positions(config):
      if config.position == 'none':
        return []
      position = POSITIONS[config.position]
      return [position(config.max_len, config.d_model, rngs=rngs)]

    def last_norm(config):  # with 'post' the last block has normalised already
      pre = config.norm_position == 'pre'
      return [NORMS[config.norm](config.d_model)] if pre else []

    self.embed = Embed(config.vocab_size, config.d_model, rngs=rngs)
    self.encoder_positions = nnx.List(positions(encoder))
    self.encoder = Stack(encoder, causal=False, rngs=rngs)
    self.encoder_norm = nnx.List(last_norm(encoder))
    self.positions = nnx.List(positions(config))
    self.blocks = nnx.List(
      DecoderBlock(config, config.pattern[i % len(config.pattern)], rngs=rngs)
      for i in range(config.num_layers)
    )
    self.norm = nnx.List(last_norm(config))
    self.dropout = config.dropout
    self.dtype = jnp.dtype(config.dtype or 'float32')

  def encode(self, source, *, source_mask=None, key=None):
    """Maps ids [B, S] to the memory [B, S, D].

    Args:
      source: int32 [B, S].
      source_mask: bool [B, S], False for padding; it needs mixers that keep
        packed sequences apart.
      key: PRNG key for dropout; None to not drop.
    """
    x = self.embed(source, self.dtype)
    for position in self.encoder_positions:
      x = position(x, jnp.arange(source.shape[1]))
    keys = (None, None) if key is None else jax.random.split(key)
    ids = None if source_mask is None else source_mask.astype(jnp.int32)
    x = dropout(x, self.dropout, keys[0])
    x, _ = self.encoder(x, Context(segment_ids=ids), key=keys[1])
    for norm in self.encoder_norm:
      x = norm(x)
    return x

  def __call__(
    self, tokens, memory=None, *, source_mask=None, cache=None, key=None
  ):
    """Runs the decoder.

    Args:
      tokens: int32 [B, T], targets.
      memory: from `encode`; not needed with a cache.
      source_mask: as for `encode`; not needed with a cache.
      cache: from `init_cache` or an earlier call; None for whole sequences.
      key: PRNG key for dropout; None to not drop.

    Returns:
      float32 logits [B, T, vocab] and the next cache (None without one).
    """
    layers = [None] * len(self.blocks)
    if cache is not None:
      layers, source_mask = list(cache['layers']), cache['source_mask']
    context = Context(memory=memory, memory_mask=source_mask)
    x = self.embed(tokens, self.dtype)
    for position in self.positions:
      at = 0 if cache is None else cache['length']
      x = position(x, at + jnp.arange(tokens.shape[1]))
    keys = [None] * (1 + len(self.blocks))
    if key is not None:
      keys = jax.random.split(key, len(keys))
    x = dropout(x, self.dropout, keys[0])
    for i, block in enumerate(self.blocks):
      x, layers[i] = block(x, context, layers[i], keys[i + 1])
    if cache is not None:
      length = cache['length'] + tokens.shape[1]
      cache = cache | dict(layers=layers, length=length)
    for norm in self.norm:
      x = norm(x)
    return self.embed.logits(x), cache

  def init_cache(self, memory, max_len: int, *, source_mask=None):
    """Returns the cache of no targets yet and the sources of `memory`."""
    layers = [
      (
        block.mixer.init_cache(memory.shape[0], max_len, self.dtype),
        block.cross.keys_values(memory),
      )
      for block in self.blocks
    ]
    return dict(
      layers=layers,
      length=jnp.zeros((), jnp.int32),
      source_mask=source_mask,
    )


class DecoderBlock(Block):
  """Mixer, cross-attention and ffn, each with a norm and a residual."""

  def __init__(self, config: LMConfig, mixer: str, *, rngs: nnx.Rngs):
    super().__init__(config, mixer, True, rngs=rngs)
    self.cross = CrossAttention(config.d_model, config.num_heads, rngs=rngs)
    self.cross_norm = NORMS[config.norm](config.d_model)

  def __call__(self, x, context, cache=None, key=None):
    """Maps x [B, T, D] to the same shape, and the cache to the next one."""
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    cache, heads = (None, None) if cache is None else cache

    def mix(x):
      nonlocal cache
      y, cache = self.mixer(x, context, cache)
      return y

    def read(x):
      return self.cross(x, context, heads)[0]

    x = self.residual(x, self.mixer_norm, mix, keys[0])
    x = self.residual(x, self.cross_norm, read, keys[1])
    cache = None if heads is None else (cache, heads)
    return self.feed_forward(x, keys[2]), cache
