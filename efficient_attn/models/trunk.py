"""The trunk of every model of tokens: positions, blocks, the last norm."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import LMConfig
from efficient_attn.layers.cache import Cursor, new_cursor, positions_of
from efficient_attn.layers.context import Context
from efficient_attn.layers.dropout import dropout
from efficient_attn.layers.embed import POSITIONS
from efficient_attn.layers.norm import norm_of
from efficient_attn.layers.param import Projection
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


class Trunk(nnx.Module):
  """Maps embedded tokens to the vectors that a head reads.

  Models inherit it: what they have in common then has the same name in all of
  them, and one can start from the parameters of another.

  Args:
    config: of the model.
    causal: whether no token sees a later one.
    cross: whether each block has cross-attention.
    tied: whether one repetition of the pattern serves all layers.
    embed_norm: whether the embeddings, with their positions, have a norm.
    embed_dim: their width; 0: that of the model.
    rngs: of the parameters.
  """

  def __init__(
    self,
    config: LMConfig,
    *,
    causal: bool,
    cross: bool = False,
    tied: bool = False,
    embed_norm: bool = False,
    embed_dim: int = 0,
    rngs: nnx.Rngs,
  ):
    width = embed_dim or config.d_model
    if config.position == 'none':
      self.position = None
    else:
      position = POSITIONS[config.position]
      self.position = position(config.max_len, width, rngs=rngs)
    embed_norm = embed_norm or config.embedding.norm
    self.embed_norm = norm_of(config)(width) if embed_norm else None
    if embed_dim:
      wide = {'embed': config.d_model}
      self.widen = Projection({'narrow': width}, wide, bias=True, rngs=rngs)
    else:
      self.widen = None
    self.stack = Stack(config, causal, cross=cross, tied=tied, rngs=rngs)
    if config.norm_position == 'post':  # the last block has normalised already
      self.norm = None
    else:
      self.norm = norm_of(config)(config.d_model)
    self.dropout = config.dropout
    self.dtype = jnp.dtype(config.dtype or 'float32')

  def run(self, x, context: Context, cache: LMCache | None = None, key=None):
    """Maps embeddings to [B, T, D], and the cache to the next one."""
    count, cursor = x.shape[1], cache and cache.cursor
    if self.position is not None:
      x = self.position(x, positions_of(context, cursor or new_cursor(), count))
    for enter in (self.embed_norm, self.widen):
      x = x if enter is None else enter(x)
    keys = (None, None) if key is None else jax.random.split(key)
    x = dropout(x, self.dropout, keys[0])
    x, layers = self.stack(x, context, cache and cache.layers, keys[1])
    if self.norm is not None:
      x = self.norm(x)
    if cache is not None:
      cursor = cursor.advance(count, context)
      cache = LMCache(layers=layers, cursor=cursor)
    return x, cache
