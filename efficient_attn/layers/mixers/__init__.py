"""Every token mixer, one row each.

The contract of a mixer:

  mixer(x, *, positions=None, segment_ids=None, cache=None) -> (y, cache)
  mixer.init_cache(batch, max_len, dtype) -> cache

x and y are [B, T, D]; positions [T] or [B, T] int32 (default: counted from the
start, or from what the cache has seen); segment_ids [B, T] int32 keep packed
sequences apart, of which one ends where the id changes. Id 0 is padding, which
may hold anything, NaN and infinities too. A NaN in another segment or in the
future stays there only where it is in another chunk or tile.
Without a cache the call sees whole sequences; with one the same call continues
where the cache ends, by one token or by many.

A mixer may have a method penalty() -> scalar, which training adds to the mean
loss. The parameters of a scanned stack have a leading axis of layers there, so
it is a sum over all of them.

Adding a method is one file in the folder of its family and one row in the
table there.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from flax import nnx

from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.mixers.both_ways import BothWays
from efficient_attn.layers.mixers.compact import COMPACT
from efficient_attn.layers.mixers.gated import GATED
from efficient_attn.layers.mixers.low_rank import LOW_RANK
from efficient_attn.layers.mixers.patterns import PATTERNS
from efficient_attn.layers.mixers.routed import ROUTED
from efficient_attn.layers.mixers.selective import SELECTIVE
from efficient_attn.layers.mixers.softmax import SOFTMAX
from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec
from efficient_attn.layers.mixers.test_time import TEST_TIME
from efficient_attn.layers.mixers.ungated import UNGATED
from efficient_attn.values import read_arguments

__all__ = [
  'MIXERS',
  'MixerSpec',
  'build_mixer',
  'mixer_options',
  'read_options',
]

MIXERS = (
  SOFTMAX
  | COMPACT
  | PATTERNS
  | ROUTED
  | LOW_RANK
  | UNGATED
  | GATED
  | SELECTIVE
  | TEST_TIME
)


def build_mixer(
  name: str,
  *,
  d_model: int,
  num_heads: int,
  rngs: nnx.Rngs,
  causal: bool = True,
  **options,
) -> nnx.Module:
  """Builds the mixer of row `name` with its own `options`.

  Raises:
    ConfigError: an unknown name or option, a value the mixer refuses,
      causal=False for a mixer that is causal only, or causal=True for one of
      encoders.
  """
  spec = choose('model.pattern', name, MIXERS)
  if not causal and not spec.bidirectional:
    able = [n for n, s in MIXERS.items() if s.bidirectional]
    raise ConfigError(
      f'model.pattern={name!r} is causal only; for an encoder use one of '
      f'{", ".join(able)}'
    )
  if causal and not spec.causal:
    able = [n for n, s in MIXERS.items() if s.causal]
    raise ConfigError(
      f'model.pattern={name!r} is a mixer of encoders: every token sees every '
      f'other; for a decoder use one of {", ".join(able)}'
    )
  options = read_options(name, options)
  two_passes = not causal and spec.bidirectional == TWO_PASSES
  try:
    mixer = spec.build(
      d_model=d_model,
      num_heads=num_heads,
      causal=causal or two_passes,
      rngs=rngs,
      **options,
    )
  except ConfigError as error:  # the mixer does not know its key
    raise ConfigError(f'model.mixers.{name}: {error}') from error
  return BothWays(mixer) if two_passes else mixer


def mixer_options(name: str) -> dict[str, inspect.Parameter]:
  """Returns the options of a mixer, with their defaults, by name."""
  common = ('self', 'd_model', 'num_heads', 'causal', 'rngs', 'options')
  found = {}
  for cls in reversed(MIXERS[name].build.__mro__):
    if '__init__' in vars(cls) and issubclass(cls, nnx.Module):
      found |= inspect.signature(cls.__init__).parameters
  return {k: v for k, v in found.items() if k not in common}


def read_options(
  name: str, options: Mapping[str, Any], key: str = ''
) -> dict[str, Any]:
  """Reads the options of a mixer by the annotations of its constructor.

  Args:
    name: of the row.
    options: values, or strings of them as from a command line.
    key: of the options in errors; 'model.mixers.<name>' by default.
  """
  kinds = {k: p.annotation for k, p in mixer_options(name).items()}
  return read_arguments(
    kinds, options, f'{key or f"model.mixers.{name}"}.', name
  )
