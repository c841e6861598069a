"""The block of every model: a token mixer and an ffn, each on the residual.

  pre       x + f(norm(x))
  post      norm(x + f(x))                  as the Transformer and BERT
  sandwich  x + post_norm(f(norm(x)))       as Gemma 2
  branch    x + norm(f(x))                  as OLMo 2
  normed    norm(x) + f(norm(x))            as MiniMax

In parallel form, x + mixer(mixer_norm(x)) + ffn(ffn_norm(x)), both halves read
the same stream, with a norm each (GPT-NeoX) or a shared one (GPT-J, Falcon).
"""

import dataclasses
from typing import Any

import chex
import jax
from flax import nnx

from efficient_attn.config import ConfigError, ModelConfig
from efficient_attn.layers.capture import tap
from efficient_attn.layers.context import Context
from efficient_attn.layers.cross_attention import CrossAttention, CrossCache
from efficient_attn.layers.dropout import dropout
from efficient_attn.layers.ffns import build_ffn
from efficient_attn.layers.mixer import Mixer, Penalized
from efficient_attn.layers.mixers import build_mixer
from efficient_attn.layers.norm import norm_of
from efficient_attn.values import read_value, under


def row_of(name: str) -> str:
  """The row of a name in a pattern: 'window:far' is a 'window' of its own."""
  return name.partition(':')[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
  """The factors of a residual connection: skip x + branch f(x)."""

  skip: float = 1.0
  branch: float = 1.0


@chex.dataclass(frozen=True)
class BlockCache:
  """The caches of a block whose ffn sees earlier tokens too."""

  mixer: Any
  ffn: Any


class Block(nnx.Module):
  """Mixer and ffn, each with its norms and a residual connection.

  With `cross` there is cross-attention to a memory between the two. `mixer` and
  `ffn` are names in the patterns of the config, '' its `ffn`.
  """

  def __init__(
    self,
    config: ModelConfig,
    mixer: str,
    causal: bool,
    *,
    ffn: str = '',
    cross: bool = False,
    rngs: nnx.Rngs,
  ):
    ffn = ffn or config.ffn
    self.mixer = build_mixer(
      row_of(mixer),
      d_model=config.d_model,
      causal=causal,
      rngs=rngs,
      **{'num_heads': config.num_heads, **config.mixers.get(mixer, {})},
    )
    with under(f'model.ffns.{ffn}'):
      options = config.ffns.get(ffn, {})
      self.ffn = build_ffn(row_of(ffn), config, options, rngs=rngs)
      # Else it sees one token at a time.
      self.ffn_sees_past = isinstance(self.ffn, Mixer)
      if self.ffn_sees_past and not causal:
        raise ConfigError('it is of decoders: its tokens see the one before')
    if cross:
      self.cross = CrossAttention(config.d_model, config.num_heads, rngs=rngs)
    else:
      self.cross = None
    self.norm_position, self.parallel = config.norm_position, config.parallel
    if cross and self.parallel != 'none':
      raise ConfigError(
        f'model.parallel={self.parallel!r}: a block with cross-attention has '
        "no parallel form; use 'none'"
      )
    for half in ('mixer', 'ffn', 'cross'):
      self._add_norms(half, config)
    self.mixer_residual = residual_of(config, mixer)
    self.ffn_residual = residual_of(config, ffn)
    self.cross_residual = Residual()
    self.name, self.row = mixer, row_of(mixer)  # in the pattern, the table
    self.dropout = config.dropout
    self.shares = False  # whether it takes part in `share`
    modules = (module for _, module in nnx.iter_modules(self.mixer))
    self.penalized = any(isinstance(m, Penalized) for m in modules)

  def _add_norms(self, half: str, config: ModelConfig) -> None:
    """Gives a half its norms, `<half>_norm` and perhaps `<half>_post_norm`."""
    norm = norm_of(config)
    absent = getattr(self, half) is None
    shared = half == 'ffn' and self.parallel == 'shared_norm'
    own = None if absent or shared else norm(config.d_model)
    setattr(self, f'{half}_norm', own)
    if self.norm_position == 'sandwich' and not absent:
      setattr(self, f'{half}_post_norm', norm(config.d_model))

  def __call__(self, x, context, cache, key, shared):
    """Returns x [B, T, D], the cache and `shared`, all for what comes next."""
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    memory = None
    if self.cross is not None and cache is not None:
      cache, memory = cache.mixer, cache.memory
    ffn_cache = None
    if self.ffn_sees_past and cache is not None:
      cache, ffn_cache = cache.mixer, cache.ffn

    def mix(x):
      nonlocal cache, shared
      with under(f'model.mixers.{self.name}'):
        if self.shares:
          x = self.mixer.ready(x, context, cache)
          y, cache, shared = self.mixer.mix_sharing(x, context, cache, shared)
        else:
          y, cache = self.mixer(x, context, cache)
      return tap('mixer', y)

    start = x
    with jax.named_scope('mixer'):
      x = self.residual('mixer', x, mix, keys[0])
    if self.cross is not None:
      x = self.read(x, context, memory, keys[2])
    source = None if self.parallel == 'none' else start
    x, ffn_cache = self.feed_forward(x, context, keys[1], source, ffn_cache)
    if ffn_cache is not None:
      cache = BlockCache(mixer=cache, ffn=ffn_cache)
    if memory is not None:
      cache = CrossCache(mixer=cache, memory=memory)
    return tap('block', x), cache, shared

  def read(self, x, context, memory, key):
    """The part of the block that reads a memory, that of the context if None.

    The memory stays as it is.
    """

    def cross(x):
      return tap('cross', self.cross(x, context, memory)[0])

    with jax.named_scope('cross'):
      return self.residual('cross', x, cross, key)

  def feed_forward(self, x, context, key, source=None, cache=None):
    """The block's second half, if it has one, and its cache.

    See `residual`.
    """
    if self.ffn is None:
      return x, None

    def feed(x):
      nonlocal cache
      if self.ffn_sees_past:
        y, cache = self.ffn(x, context, cache)
      else:
        y = self.ffn(x, context)
      return tap('ffn', y)

    with jax.named_scope('ffn'):
      return self.residual('ffn', x, feed, key, source), cache

  def residual(self, half, x, f, key, source=None):
    """Returns x with the branch f of a half, under its norms.

    Args:
      half: mixer | ffn | cross.
      x: the stream [B, T, D].
      f: from [B, T, D] to the same shape.
      key: of the dropout.
      source: what the branch reads; None: x.
    """
    position, factors = self.norm_position, getattr(self, f'{half}_residual')
    norm = getattr(self, f'{half}_norm') or self.mixer_norm
    if position == 'normed':
      x = norm(x)
    source = x if source is None else source
    y = f(norm(source) if position in ('pre', 'sandwich') else source)
    if position == 'branch':
      y = norm(y)
    elif position == 'sandwich':
      y = getattr(self, f'{half}_post_norm')(y)
    y = dropout(y, self.dropout, key)
    x = scaled(x, factors.skip) + scaled(y, factors.branch)
    return norm(x) if position == 'post' else x

  def init_cache(self, batch: int, max_len: int, dtype, context: Context):
    """Returns the cache before the first token, with the context's memory."""
    cache = self.mixer.init_cache(batch, max_len, dtype)
    if self.ffn_sees_past:
      ffn = self.ffn.init_cache(batch, max_len, dtype)
      cache = BlockCache(mixer=cache, ffn=ffn)
    if self.cross is None:
      return cache
    return CrossCache(mixer=cache, memory=self.cross.remember(context))


def scaled(x: jax.Array, factor: float) -> jax.Array:
  """Returns x times a factor."""
  return x if factor == 1 else x * factor


def residual_of(config: ModelConfig, name: str) -> Residual:
  """Returns the factors of a mixer or ffn by its name in the pattern."""
  key = f'model.residuals.{name}'
  found = read_value(Residual, config.residuals.get(name, {}), key)
  if found.skip != 1 and config.parallel != 'none':
    raise ConfigError(
      f'{key}.skip={found.skip}: a parallel block has one stream for both '
      'halves; scale their branches instead'
    )
  return found
