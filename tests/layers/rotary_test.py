"""Scaled rotary frequencies against formulas written out channel by channel."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.config import ConfigError
from efficient_attn.layers.rotary import Rotary, Scaling

BASE, H, LENGTH = 1000.0, 16, 32


def linear(f, i, length):
  return f / 4


def dynamic(f, i, length):
  longer = max(length, LENGTH) / LENGTH
  base = BASE * (4 * longer - 3) ** (H / (H - 2))
  return base ** (-2 * i / H)


def llama3(f, i, length):
  wave = 2 * math.pi / f
  if wave < LENGTH / 4:
    return f
  if wave > LENGTH / 1:
    return f / 4
  smooth = (LENGTH / wave - 1) / (4 - 1)
  return (1 - smooth) * f / 4 + smooth * f


def yarn(f, i, length, floor=math.floor, ceil=math.ceil):
  def channel(turns):
    return H * math.log(LENGTH / (turns * 2 * math.pi)) / (2 * math.log(BASE))

  low, high = max(floor(channel(8)), 0), min(ceil(channel(0.5)), H - 1)
  ramp = min(max((i - low) / (high - low), 0), 1)
  return f / 4 * ramp + f * (1 - ramp)


def ramp(f, i, length):
  return yarn(f, i, length, lambda x: x, lambda x: x)


def longrope(f, i, length):
  return f / (2 + i if length > LENGTH else 1 + i / 8)


YARN = dict(type='yarn', beta_fast=8.0, beta_slow=0.5)
LONG = dict(
  type='longrope',
  short_factor=tuple(1 + i / 8 for i in range(H // 2)),
  long_factor=tuple(2.0 + i for i in range(H // 2)),
)
CASES = {
  'linear': (dict(type='linear'), linear, 1.0),
  'dynamic': (dict(type='dynamic'), dynamic, 1.0),
  'llama3': (dict(type='llama3'), llama3, 1.0),
  'yarn': (YARN, yarn, 0.1 * math.log(4) + 1),
  'yarn, not rounded': (
    YARN | dict(truncate=False, attention_factor=1.5),
    ramp,
    1.5,
  ),
  'yarn, mscale': (
    YARN | dict(mscale=0.7, mscale_all_dim=2.0),
    yarn,
    (0.07 * math.log(4) + 1) / (0.2 * math.log(4) + 1),
  ),
  'longrope': (
    LONG,
    longrope,
    math.sqrt(1 + math.log(4) / math.log(LENGTH)),
  ),
}


def turned(x, positions, frequency, factor):
  """Rotates pair (i, i + H / 2) by hand."""
  y, length = np.empty_like(x), positions.max() + 1
  for i in range(H // 2):
    f = frequency(BASE ** (-2 * i / H), i, length)
    c, s = np.cos(positions * f)[:, None], np.sin(positions * f)[:, None]
    a, b = x[..., i], x[..., i + H // 2]
    y[..., i] = factor * (a * c - b * s)
    y[..., i + H // 2] = factor * (b * c + a * s)
  return y


@pytest.mark.parametrize('count', [LENGTH - 3, LENGTH + 9])
@pytest.mark.parametrize('name', CASES)
def test_scaling(name, count):
  options, frequency, factor = CASES[name]
  scaling = Scaling(factor=4.0, original_length=LENGTH, **options)
  x = np.random.default_rng(0).normal(size=(2, count, 3, H))
  positions = np.arange(count)
  with jax.enable_x64():
    found = Rotary(base=BASE, scaling=scaling)(
      jnp.asarray(x), jnp.asarray(positions)
    )
  wanted = turned(x, positions, frequency, factor)
  np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_interleaved_is_a_permutation_of_channels():
  x = np.random.default_rng(0).normal(size=(2, 5, 3, H)).astype(np.float32)
  at, rotated = jnp.arange(5), H // 2
  pairs = np.arange(rotated).reshape(-1, 2).T.reshape(-1)
  order = np.concatenate([pairs, np.arange(rotated, H)])
  halves = Rotary(fraction=0.5)(jnp.asarray(x[..., order]), at)
  found = Rotary(fraction=0.5, interleaved=True)(jnp.asarray(x), at)
  np.testing.assert_array_equal(found[..., order], halves)


def test_longrope_has_a_factor_for_each_pair():
  rotary = Rotary(scaling=Scaling(type='longrope', short_factor=(1.0,)))
  with pytest.raises(ConfigError, match='short_factor has 1 numbers; .* of 8'):
    rotary(jnp.zeros((1, 2, 1, H)), jnp.arange(2))
