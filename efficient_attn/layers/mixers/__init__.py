"""Every token mixer, one row each.

The contract of a mixer is that of `layers.mixer`.

Adding a method is one file in the folder of its family and one row in the
table there.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from flax import nnx

from efficient_attn.config import ConfigError, choose
from efficient_attn.formats import moved, renamed
from efficient_attn.layers.mixers.attention_free import ATTENTION_FREE
from efficient_attn.layers.mixers.both_ways import BothWays
from efficient_attn.layers.mixers.compact import COMPACT
from efficient_attn.layers.mixers.composed import Composed, own_options
from efficient_attn.layers.mixers.gated import GATED
from efficient_attn.layers.mixers.hybrid import HYBRID
from efficient_attn.layers.mixers.linear import LINEAR
from efficient_attn.layers.mixers.low_rank import LOW_RANK
from efficient_attn.layers.mixers.routed import ROUTED
from efficient_attn.layers.mixers.selective import SELECTIVE
from efficient_attn.layers.mixers.softmax import SOFTMAX
from efficient_attn.layers.mixers.sparse import SPARSE
from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec
from efficient_attn.layers.mixers.test_time import TEST_TIME
from efficient_attn.values import Positive, read_arguments, under

__all__ = [
  'FAMILIES',
  'MIXERS',
  'MixerSpec',
  'build_mixer',
  'choose_mixer',
  'mixer_options',
  'read_options',
]

# The families of methods, each a folder here.
FAMILIES = {
  'softmax': SOFTMAX,
  'compact': COMPACT,
  'sparse': SPARSE,
  'routed': ROUTED,
  'low_rank': LOW_RANK,
  'attention_free': ATTENTION_FREE,
  'linear': LINEAR,
  'gated': GATED,
  'selective': SELECTIVE,
  'test_time': TEST_TIME,
  'hybrid': HYBRID,
}
MIXERS = {name: row for rows in FAMILIES.values() for name, row in rows.items()}


def choose_mixer(key: str, name: str) -> MixerSpec:
  """Returns a row; an unknown name is a `ConfigError` about `key`."""
  if isinstance(name, str) and (now := renamed(name)):
    raise ConfigError(f'{key}={name!r} is called {now!r} now')
  return choose(key, name, MIXERS)


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

  `num_heads` is read as an option, so that one mixer of a model may have more
  or fewer heads than the others.

  Raises:
    ConfigError: an unknown name or option, a value the mixer refuses,
      causal=False for a mixer that is causal only, or causal=True for one of
      encoders.
  """
  spec = choose_mixer('model.pattern', name)
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
  options = read_options(name, {'num_heads': num_heads, **options})
  two_passes = not causal and spec.bidirectional == TWO_PASSES
  with under(f'model.mixers.{name}'):
    mixer = spec.build(
      d_model=d_model,
      causal=causal or two_passes,
      rngs=rngs,
      **options,
    )
  return BothWays(mixer) if two_passes else mixer


def mixer_options(name: str) -> dict[str, inspect.Parameter]:
  """Returns the options of a mixer, with their defaults, by name."""
  build = MIXERS[name].build
  return build.options() if isinstance(build, Composed) else own_options(build)


def read_options(
  name: str, options: Mapping[str, Any], key: str = ''
) -> dict[str, Any]:
  """Reads the options of a mixer by the annotations of its constructor.

  Args:
    name: of the row.
    options: values, or strings of them as from a command line.
    key: of the options in errors; 'model.mixers.<name>' by default.
  """
  key = key or f'model.mixers.{name}'
  for option, value in options.items():
    if where := moved(name, option):
      raise ConfigError(f'{key}.{option}={value!r} has gone: {where}')
  kinds = {k: p.annotation for k, p in mixer_options(name).items()}
  kinds['num_heads'] = Positive  # that of the model by default
  return read_arguments(kinds, options, f'{key}.', name)


def complete_options(
  name: str, options: Mapping[str, Any], key: str = ''
) -> dict[str, Any]:
  """Returns what `read_options` does, and the default of every other option."""
  defaults = {k: p.default for k, p in mixer_options(name).items()}
  return defaults | read_options(name, options, key)
