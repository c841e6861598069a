"""The rotary words of config.json, which have changed their form twice.

Files of transformers 5 have `rope_parameters`, {rope_type, rope_theta, ...} or
one of these for each kind of layer. Before, there were `rope_theta`,
`partial_rotary_factor` and `rope_scaling` {type or rope_type, factor, ...}.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_attn.config import ConfigError
from efficient_attn.interop.words import Ours, Words, integer, word

# Theirs -> ours, of a scaling.
NAMES = {
  'rope_type': 'type',
  'factor': 'factor',
  'original_max_position_embeddings': 'original_length',
  'attention_factor': 'attention_factor',
  'low_freq_factor': 'low_freq_factor',
  'high_freq_factor': 'high_freq_factor',
  'beta_fast': 'beta_fast',
  'beta_slow': 'beta_slow',
  'truncate': 'truncate',
  'mscale': 'mscale',
  'mscale_all_dim': 'mscale_all_dim',
  'short_factor': 'short_factor',
  'long_factor': 'long_factor',
}
# Scaling type -> the words that it reads, of theirs.
_LENGTH = 'original_max_position_embeddings'
TYPES = {
  'linear': ('factor',),
  'dynamic': ('factor',),
  'llama3': ('factor', _LENGTH, 'low_freq_factor', 'high_freq_factor'),
  'yarn': (
    'factor', _LENGTH, 'attention_factor', 'beta_fast', 'beta_slow',
    'truncate', 'mscale', 'mscale_all_dim',
  ),
  'longrope': (
    'factor', _LENGTH, 'attention_factor', 'short_factor', 'long_factor',
  ),
}  # fmt: skip
BETAS = {'beta_fast': 32.0, 'beta_slow': 1.0}  # yarn, where there is none


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary options of the mixers.

  Attributes:
    base: theirs where no word has it; by kind of layer where kinds differ.
    kinds: from a kind of layer to our mixer, where each has words of its own.
    fraction: share of the channels where no word has it.
    thetas: names of the base in older files.
    fractions: names of the share.
    local: older name of the base of sliding layers alone.
    scaled: the kinds that older scalings and bases are of; (): all.
  """

  base: float | Mapping[str, float] = 10_000.0
  kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fraction: float = 1.0
  thetas: str = 'rope_theta'
  fractions: str = 'partial_rotary_factor'
  local: str = ''
  scaled: tuple[str, ...] = ()

  @property
  def theirs(self) -> tuple[str, ...]:
    """The words that it reads."""
    names = (self.thetas, self.fractions, self.local)
    return (
      'rope_parameters', 'rope_scaling', _LENGTH,
      *(n for name in names if name for n in name.split('|')),
    )  # fmt: skip

  def read(self, words: Words) -> dict[str, Any]:
    """Returns the options of each mixer."""
    if not self.kinds:
      return self._options('*', self._parameters(words, ''), words)
    found = {}
    for kind, mixer in self.kinds.items():
      found |= self._options(mixer, self._parameters(words, kind), words)
    return found

  def _parameters(self, words, kind):
    """Returns {rope_type, rope_theta, ...} of a kind of layer."""
    given = words.get('rope_parameters')
    given = words.get('rope_scaling') if given is None else given
    given = {} if given is None else given
    if not isinstance(given, Mapping):
      raise ConfigError('rope_parameters must be an object')
    nested = kind in given
    if nested:
      given = {} if given[kind] is None else given[kind]
      if not isinstance(given, Mapping):
        raise ConfigError(f'rope_parameters.{kind} must be an object')
    base = self.base[kind] if isinstance(self.base, Mapping) else self.base
    local = kind == 'sliding_attention' and self.local
    if local:
      base = words.get(self.local, base)
    elif not kind or not self.scaled or kind in self.scaled:
      base = word(words, self.thetas, base)
    if not nested and self.scaled and kind not in self.scaled:
      given = {}
    fraction = word(words, self.fractions, self.fraction)
    return dict(rope_theta=base, partial_rotary_factor=fraction) | given

  def _options(self, mixer, given, words):
    given = dict(given)
    kind = given.pop('type', None)
    kind = given.pop('rope_type', kind) or 'default'
    found = {
      f'mixers.{mixer}.rotary.base': given.pop('rope_theta'),
      f'mixers.{mixer}.rotary.fraction': given.pop('partial_rotary_factor'),
      f'mixers.{mixer}.rotary.scaling': None,
    }
    if kind == 'default':
      return found
    if not isinstance(kind, str) or kind not in TYPES:
      raise ConfigError(
        f'rope_type={kind!r} is not supported; valid: default, '
        f'{", ".join(TYPES)}'
      )
    length = integer(words, 'max_position_embeddings', 2048)
    if kind == 'dynamic':  # whatever the file says
      given[_LENGTH] = length
    elif _LENGTH in TYPES[kind]:
      given = {_LENGTH: length} | given
      given[_LENGTH] = integer(words, _LENGTH, integer(given, _LENGTH))
    if kind in ('yarn', 'longrope') and given.get('factor') is None:
      given['factor'] = length / given[_LENGTH]
    scaling = {'type': kind}
    for name, value in given.items():
      if name not in NAMES:
        raise ConfigError(f'rope_parameters.{name} is not supported')
      if name.startswith('mscale'):
        value = value or None
      if name in TYPES[kind] or kind == 'dynamic' and name == _LENGTH:
        scaling[NAMES[name]] = BETAS.get(name) if value is None else value
    found[f'mixers.{mixer}.rotary.scaling'] = scaling
    return found

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns `rope_parameters`."""
    if not self.kinds:
      found = {'rope_parameters': self._written(ours, '*')}
      scaling = ours.get('mixers.*.rotary.scaling', None)
      if scaling and scaling['type'] == 'dynamic':
        found['max_position_embeddings'] = scaling['original_length']
      return found
    return {
      'rope_parameters': {
        kind: self._written(ours, mixer)
        for kind, mixer in self.kinds.items()
        if mixer in ours.pattern
      }
    }

  def _written(self, ours, mixer):
    rotary = f'mixers.{mixer}.rotary'
    scaling = ours.get(f'{rotary}.scaling', None) or {'type': 'default'}
    base = ours.get(f'{rotary}.base', None)
    if base is None:  # no layer is rotated
      return {'rope_type': 'default', 'rope_theta': self.base}
    found = {'rope_theta': base}
    fraction = ours.get(f'{rotary}.fraction', 1.0)
    if fraction != 1 or self.fraction != 1:
      found['partial_rotary_factor'] = fraction
    known = ('rope_type', *TYPES.get(scaling['type'], ()))
    return found | {
      name: _json(scaling[NAMES[name]])
      for name in known
      if scaling.get(NAMES[name]) is not None
    }


def _json(value):
  return list(value) if isinstance(value, tuple) else value
