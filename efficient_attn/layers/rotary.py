"""Rotary embedding whose frequencies serve more tokens than were trained on.

With f_i = base^(-2i/R), i < R/2, and factor s,

  linear    f_i / s                                    Chen et al. 2306.15595
  dynamic   those of a base that grows with the length (NTK-aware)
  yarn      f_i / s where a wave is long, f_i where it is short, mixed between
            them; logits grow, too                     Peng et al. 2309.00071
  llama3    the same with another mixture              Llama 3.1, 2407.21783
  longrope  f_i / s_i, searched: short and long ones   Ding et al. 2402.13753
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.ops.positions import rotary
from efficient_attn.values import OneOf, Positive, PositiveFloat, Share


@dataclasses.dataclass(frozen=True)
class Scaling:
  """Changes frequencies; `original_length` is that of the training before.

  Attributes:
    attention_factor: of queries and keys; None: the rule of the type.
    low_freq_factor, high_freq_factor: llama3: waves longer than
      original_length / low are divided, those shorter than by high are not.
    beta_fast, beta_slow: yarn: the turns in original_length between which
      frequencies are mixed.
    truncate: yarn: whether these channels are rounded to whole ones.
    mscale, mscale_all_dim: yarn: weights of log(factor) in attention_factor.
    short_factor, long_factor: longrope: s_i up to original_length, and past it.
  """

  type: Annotated[
    str, OneOf(('linear', 'dynamic', 'yarn', 'llama3', 'longrope'))
  ] = 'linear'
  factor: PositiveFloat = 1.0
  original_length: Positive = 2048
  attention_factor: PositiveFloat | None = None
  low_freq_factor: PositiveFloat = 1.0
  high_freq_factor: PositiveFloat = 4.0
  beta_fast: PositiveFloat = 32.0
  beta_slow: PositiveFloat = 1.0
  truncate: bool = True
  mscale: PositiveFloat | None = None
  mscale_all_dim: PositiveFloat | None = None
  short_factor: tuple[PositiveFloat, ...] = ()
  long_factor: tuple[PositiveFloat, ...] = ()

  def frequencies(self, base: float, count: int, length):
    """Returns f_i, i < count, where rows have `length` tokens."""
    i = np.arange(count) / count
    f, s = base**-i, self.factor
    if self.type == 'linear':
      return f / s
    if self.type == 'llama3':
      turns = self.original_length * f / (2 * np.pi)
      low, high = self.low_freq_factor, self.high_freq_factor
      short = np.clip((turns - low) / (high - low), 0, 1)
      return short * f + (1 - short) * f / s
    if self.type == 'yarn':
      return self._yarn(base, f)
    longer = jnp.maximum(length, self.original_length) / self.original_length
    if self.type == 'dynamic':
      grown = s * longer - (s - 1)
      return f * grown ** -(i * count / max(count - 1, 1))
    for name in ('short_factor', 'long_factor'):
      if len(getattr(self, name)) != count:
        raise ConfigError(
          f'rotary.scaling.{name} has {len(getattr(self, name))} numbers; it '
          f'needs one for each of {count} pairs of channels'
        )
    f = f / np.array([self.short_factor, self.long_factor])
    return jnp.where(longer > 1, f[1], f[0])

  def _yarn(self, base, f):
    def channel(turns):
      waves = self.original_length / (2 * math.pi * turns)
      return len(f) * math.log(waves) / math.log(base)

    low, high = channel(self.beta_fast), channel(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(f) - 1)
    long = (np.arange(len(f)) - low) / max(high - low, 1e-3)
    long = np.clip(long, 0, 1)
    return long * f / self.factor + (1 - long) * f

  def factor_of_heads(self) -> float:
    """Returns the factor of queries and keys."""
    if self.attention_factor is not None:
      return self.attention_factor
    log = math.log(max(self.factor, 1))
    if self.type == 'longrope':
      return math.sqrt(1 + log / math.log(self.original_length))
    if self.type != 'yarn':
      return 1.0
    if self.mscale and self.mscale_all_dim:
      return (0.1 * self.mscale * log + 1) / (
        0.1 * self.mscale_all_dim * log + 1
      )
    return 0.1 * log + 1


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Rotates the first `fraction` of the channels of every head.

  Pairs are halves of these channels, or neighbours if `interleaved`.
  """

  base: PositiveFloat = 10_000.0
  fraction: Share = 1.0
  interleaved: bool = False
  scaling: Scaling | None = None

  def __call__(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
    """Maps heads [B, T, N, H] at positions [T] or [B, T] to the same shape."""
    options = dict(
      base=self.base, fraction=self.fraction, interleaved=self.interleaved
    )
    if self.scaling is not None:
      dtype = jnp.promote_types(heads.dtype, jnp.float32)
      count = int(heads.shape[-1] * self.fraction) // 2
      length = jnp.max(positions).astype(dtype) + 1
      frequencies = self.scaling.frequencies(self.base, count, length)
      options['frequencies'] = jnp.asarray(frequencies, dtype)
      options['factor'] = self.scaling.factor_of_heads()
    return rotary(heads, positions, **options)
