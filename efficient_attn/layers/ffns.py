"""Every feed-forward layer, one row each.

  ffn(x, context=None) -> y

x and y are [B, T, D]. One that sees earlier tokens is a `Mixer` and follows
that contract, with a cache. A row is called with the width, the activation and
the options that its constructor reads, see `build_ffn`.
"""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any

from flax import nnx

from efficient_attn.config import ConfigError, ModelConfig, choose
from efficient_attn.layers.channel_mix import ChannelMix
from efficient_attn.layers.ffn import ACTIVATIONS, GLU, MLP
from efficient_attn.layers.mixers.composed import own_options
from efficient_attn.layers.moe import MoE
from efficient_attn.values import NonNegative, OneOf, read_arguments

# None: a block is a mixer alone, as in Mamba.
FFNS = {
  'glu': GLU,
  'mlp': MLP,
  'moe': MoE,
  'channel_mix': ChannelMix,
  'none': None,
}

# Options of every row, for which the model has a value: its key.
OF_THE_MODEL = {
  'ffn_dim': 'ffn_dim',
  'activation': 'activation',
  'bias': 'ffn_bias',
}


def build_ffn(
  name: str,
  config: ModelConfig,
  options: Mapping[str, Any],
  *,
  rngs: nnx.Rngs,
) -> nnx.Module | None:
  """Builds the ffn of row `name`; what `options` lacks is as the model says."""
  row = choose('model.ffn', name, FFNS)
  if row is None:
    return None
  given = {k: getattr(config, key) for k, key in OF_THE_MODEL.items()}
  given |= read_ffn_options(name, options, f'model.ffns.{name}')
  activation = choose('model.activation', given.pop('activation'), ACTIVATIONS)
  return row(
    config.d_model, given.pop('ffn_dim'), activation, rngs=rngs, **given
  )


def ffn_options(name: str) -> dict[str, inspect.Parameter]:
  """Returns the options that are a row's own, with defaults, by name."""
  row = FFNS[name]
  found = {} if row is None else own_options(row)
  return {k: p for k, p in found.items() if k not in OF_THE_MODEL}


def read_ffn_options(
  name: str, options: Mapping[str, Any], key: str
) -> dict[str, Any]:
  """Reads the options of a row by the annotations of its constructor.

  Args:
    name: of the row.
    options: values, or strings of them as from a command line.
    key: of the options in errors.
  """
  if FFNS[name] is None and options:
    raise ConfigError(f'{key}={options!r}: {name!r} has no options')
  kinds = {
    'ffn_dim': NonNegative,
    'activation': Annotated[str, OneOf(tuple(ACTIVATIONS))],
    'bias': bool,
  }
  kinds |= {k: p.annotation for k, p in ffn_options(name).items()}
  return read_arguments(kinds, options, f'{key}.', name)


def complete_ffn_options(
  name: str, options: Mapping[str, Any], key: str
) -> dict[str, Any]:
  """Returns what `read_ffn_options` does, and a row's own other defaults."""
  defaults = {k: p.default for k, p in ffn_options(name).items()}
  return defaults | read_ffn_options(name, options, key)
