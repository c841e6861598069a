"""Describes a family of published models: words, and a table of tensors."""

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import (
  ConfigError,
  LMConfig,
  ModelConfig,
  as_dict,
  resolve,
)
from efficient_attn.interop.table import Row
from efficient_attn.interop.words import IGNORED, Ours, Part, Words, expand
from efficient_attn.layers.block import residual_of
from efficient_attn.layers.ffns import (
  FFNS,
  OF_THE_MODEL,
  complete_ffn_options,
)
from efficient_attn.layers.mixers import complete_options
from efficient_attn.layers.mixers.test_time import TEST_TIME
from efficient_attn.layers.norm import norm_options
from efficient_attn.layers.stack import row_of
from efficient_attn.values import nearest

# Keys of ours that say how a model runs, not which function it is.
RUNS = ('dropout', 'remat', 'scan_layers', 'dtype')
# And of experts, how they are trained.
TRAINS = ('.balance_weight', '.balance_rate', '.z_weight')


@dataclasses.dataclass(frozen=True)
class Family:
  """Data of one `model_type`.

  Attributes:
    architecture: the class that transformers loads it by.
    words: how its config.json and ours translate.
    ours: what all of its models have of ours, by dotted key.
    ends: rows of the tensors outside of blocks.
    block: what the names of the tensors of block {i} begin with.
    blocks: rows of a block.
    prefix: what files of base models leave out of names.
    skip: names of tensors that are not read, as '*.rotary_emb.inv_freq'.
    ignored: words that change no logits, beside those of every family.
    indices: from our config to further letters of names and rules, one value a
      layer.
  """

  architecture: str
  words: tuple[Part, ...]
  ours: Mapping[str, Any]
  ends: tuple[Row, ...]
  block: str
  blocks: tuple[Row, ...]
  prefix: str = 'model.'
  skip: tuple[str, ...] = ()
  ignored: tuple[str, ...] = ()
  indices: Callable[[ModelConfig], Mapping[str, tuple]] = lambda _: {}

  def read(self, words: Words) -> LMConfig:
    """Returns our config of a config.json."""
    known = {name for part in self.words for name in part.theirs}
    for name in words:
      if name not in known and name not in IGNORED | {*self.ignored}:
        raise ConfigError(
          f'{name}={words[name]!r} is not supported; {nearest(name, known)} '
          'Remove it if it changes no logits.'
        )
    found = dict(self.ours)
    for part in self.words:
      found |= part.read(words)
    pattern, values = found['pattern'], {}
    for name, value in found.items():
      for key in expand(name, pattern):
        _put(values, key, value)
    return resolve({'model': values}).model

  def write(self, config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model.

    Raises:
      ConfigError: the family has no words for it.
    """
    ours = complete(config)
    words = {}
    for part in self.words:
      words |= part.write(Ours(ours))
    for key, (our, their) in differences(config, self.read(words)).items():
      raise ConfigError(
        f'model.{key}={our!r}: models of this format have {their!r}'
      )
    return words

  def named(self, names: Iterable[str], tensors: Container) -> str | None:
    """Returns the name by which a tensor is there, if it is."""
    names = [x for n in names for x in (n, n.removeprefix(self.prefix))]
    return next((name for name in names if name in tensors), None)


def _put(values, dotted, value):
  *parents, last = dotted.split('.')
  for parent in parents:
    values = values.setdefault(parent, {})
  values[last] = value


def complete(config: ModelConfig) -> dict[str, Any]:
  """Returns every value that decides on the function, by dotted key."""
  values = as_dict(config)
  for key in RUNS:
    del values[key]
  mixers = {}
  for name in dict.fromkeys(config.pattern):
    row = row_of(name)
    options = as_dict(complete_options(row, config.mixers.get(name, {})))
    mixers[name] = options
    options.pop('implementation', None)
    if row not in TEST_TIME:  # whose chunks are a part of the function
      options.pop('chunk_size', None)
    heads = options['num_heads'] = options.get('num_heads') or config.num_heads
    if not options.get('num_kv_heads', 1):
      options['num_kv_heads'] = heads
    if not options.get('head_dim', 1):
      options['head_dim'] = config.d_model // heads
    for side in ('key', 'value'):
      if f'{side}_dim' in options and f'expand_{side[0]}' in options:
        width = int(options.pop(f'expand_{side[0]}') * config.d_model / heads)
        options[f'{side}_dim'] = options[f'{side}_dim'] or width
    if 'key_heads' in options:
      options['key_heads'] = options['key_heads'] or heads
    if options.get('position') != 'rotary':
      options.pop('rotary', None)
  defaults = {k: p.default for k, p in norm_options(config.norm).items()}
  values |= {'mixers': mixers, 'norms': defaults | dict(config.norms)}
  del values['ffn'], values['first_ffns']
  names = tuple(ffn for _, ffn in config.layers)
  ffns = {name: _ffn_values(config, name) for name in dict.fromkeys(names)}
  values |= {'ffn_pattern': names, 'ffns': ffns}
  values['residuals'] = {
    name: as_dict(residual_of(config, name))
    for name in itertools.chain(*config.layers)
  }
  width = _ffn_values(config, config.ffn).get('ffn_dim')
  return _flat(values | {'ffn_dim': width or config.ffn_dim})


def _ffn_values(config, name):
  """Returns every option of an ffn."""
  row = row_of(name)
  given = config.ffns.get(name, {})
  options = complete_ffn_options(row, given, f'ffns.{name}')
  if FFNS[row] is None:
    return options
  shared = {k: getattr(config, key) for k, key in OF_THE_MODEL.items()}
  options = as_dict(shared | options)
  if not options['ffn_dim']:
    made = nnx.eval_shape(
      lambda: FFNS[row](config.d_model, 0, jnp.abs, rngs=nnx.Rngs(0))
    )
    options['ffn_dim'] = made.up.weight.shape[-1]
  return options


def differences(first: ModelConfig, second: ModelConfig) -> dict[str, tuple]:
  """Returns both values of each key in which two functions differ."""
  both = complete(first), complete(second)
  keys = sorted(both[0].keys() | both[1])
  found = {key: tuple(values.get(key) for values in both) for key in keys}
  del found['num_heads']  # which each mixer has
  if first.position != 'learned':
    del found['max_len']
  for key in OF_THE_MODEL.values():  # each ffn has its own
    del found[key]
  return {
    key: values
    for key, values in found.items()
    if len({*map(repr, values)}) > 1 and not key.endswith(TRAINS)
  }


def _flat(values, prefix=''):
  """Flattens groups; a scaling of rotary is one value."""
  found = {}
  for name, value in values.items():
    if isinstance(value, dict) and name != 'scaling':
      found |= _flat(value, f'{prefix}{name}.')
    else:
      found[f'{prefix}{name}'] = _tuples(value)
  return found


def _tuples(value):
  if isinstance(value, (list, tuple)):
    return tuple(map(_tuples, value))
  return value
