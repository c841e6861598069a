"""Token embeddings and the positions that are added to them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError, LogitsConfig
from efficient_attn.layers.param import fan_in_normal, param, value_of
from efficient_attn.ops.positions import sinusoidal
from efficient_attn.ops.products import product


class Embed(nnx.Module):
  """A table [vocab, D]: token ids to vectors, and vectors back to logits.

  Vectors are rows times `scale`: by default sqrt(D), which gives them unit
  variance at initialisation.
  """

  def __init__(
    self,
    vocab_size: int,
    d_model: int,
    *,
    scale: float | None = None,
    rngs: nnx.Rngs,
  ):
    table = fan_in_normal()(rngs.params(), (vocab_size, d_model), d_model)
    self.table = param(table, ('vocab', 'embed'), weight_decay=True)
    self.scale = math.sqrt(d_model) if scale is None else scale

  def __call__(self, tokens: jax.Array, dtype) -> jax.Array:
    """Maps ids [B, T] to [B, T, D]."""
    x = sharding.lookup(self.table[...], tokens, 'batch', None, 'embed')
    return x.astype(dtype) * self.scale

  def logits(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, D] to float32 logits [B, T, vocab]."""
    table = value_of(self.table, x.dtype)
    return product('btd,vd->btv', x, table, dtype=jnp.float32)


class Head(nnx.Module):
  """The logits of a table, changed as `LogitsConfig` says."""

  def __init__(
    self, table: Embed, options: LogitsConfig, bias: nnx.Param | None
  ):
    self.table, self.bias = table, bias
    self.scale, self.soft_cap = options.scale, options.soft_cap

  def logits(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, D] to float32 logits [B, T, vocab]."""
    y = self.table.logits(x) * self.scale
    if self.bias is not None:
      y = y + value_of(self.bias, y.dtype)
    if self.soft_cap is not None:
      y = self.soft_cap * jnp.tanh(y / self.soft_cap)
    return y


class LearnedPosition(nnx.Module):
  """Adds a learned row for each position below `max_len`."""

  def __init__(self, max_len: int, d_model: int, *, rngs: nnx.Rngs):
    table = 0.02 * jax.random.normal(rngs.params(), (max_len, d_model))
    self.table = param(table, (None, 'embed'), weight_decay=False)

  def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns x [B, T, D] plus the rows of positions [T] or [B, T]."""
    if x.shape[1] > self.table.shape[0]:
      raise ConfigError(
        f'{x.shape[1]} tokens but only {self.table.shape[0]} learned positions;'
        ' raise model.max_len'
      )
    lead = ('batch', None)[-positions.ndim :]
    rows = sharding.lookup(self.table[...], positions, *lead, 'embed')
    return x + rows.astype(x.dtype)


class SinusoidalPosition(nnx.Module):
  """Adds the fixed sines and cosines of Vaswani et al. (1706.03762)."""

  def __init__(self, max_len: int, d_model: int, *, rngs: nnx.Rngs):
    del max_len, rngs  # nothing to learn
    self.d_model = d_model

  def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns x [B, T, D] plus the waves at positions [T] or [B, T]."""
    return x + sinusoidal(positions, self.d_model).astype(x.dtype)


POSITIONS = {'learned': LearnedPosition, 'sinusoidal': SinusoidalPosition}
