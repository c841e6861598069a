"""Words that the models of flash-linear-attention (fla) have in common."""

import dataclasses
from typing import Annotated, Any

from efficient_attn.config import ConfigError
from efficient_attn.interop.words import (
  COUNT,
  NEEDED,
  Choice,
  Ours,
  Words,
  period,
  word,
)
from efficient_attn.layers.stack import row_of
from efficient_attn.values import Positive, PositiveFloat, Range, read_value

_Negative = Annotated[float, Range(high=0, below=True)]

# Words of its models that change no logits.
IGNORED = (
  'attn_mode', 'fuse_cross_entropy', 'fuse_linear_cross_entropy', 'fuse_norm',
  'fuse_swiglu', 'max_position_embeddings', 'use_gk', 'use_gv', 'use_l2warp',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hybrid:
  """Names the layers of softmax attention, and their options.

  `attn` is {layers, num_heads, ...}, or a list of these for several kinds of
  attention; the second is 'attention:1' in our pattern.

  Attributes:
    mixer: of the other layers.
  """

  mixer: str
  theirs = ('attn',)

  def read(self, words: Words) -> dict[str, Any]:
    """Returns the pattern and the options of attention."""
    layers, found = [self.mixer] * _count(words, COUNT), {}
    for i, spec in enumerate(_specs(word(words, 'attn', None))):
      window = spec.get('window_size')
      name = ('window' if window else 'attention') + (f':{i}' if i else '')
      heads = read_value(Positive, word(spec, 'num_heads'), 'attn.num_heads')
      found |= {
        f'mixers.{name}.num_heads': heads,
        f'mixers.{name}.num_kv_heads': spec.get('num_kv_heads') or heads,
        f'mixers.{name}.qkv_bias': spec.get('qkv_bias', False),
        f'mixers.{name}.rotary.base': spec.get('rope_theta') or 10_000.0,
      }
      if window:
        found[f'mixers.{name}.window'] = window
      for layer in word(spec, 'layers'):
        if layer not in range(len(layers)) or layers[layer] != self.mixer:
          raise ConfigError(
            f'attn.layers: {layer!r} is none of {len(layers)} layers, or twice '
            'there'
          )
        layers[layer] = name
    return found | {'pattern': period(layers)}

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns the one word."""
    layers, specs = ours.layers, []
    if self.mixer not in layers:
      raise ConfigError(
        f'model.pattern={ours.pattern}: models of this format have {self.mixer}'
      )
    for name in dict.fromkeys(layers):
      if name == self.mixer:
        continue
      if row_of(name) not in ('attention', 'window'):
        raise ConfigError(
          f'model.pattern: models of this format have {self.mixer} and '
          f'attention, not {name}'
        )
      options = f'mixers.{name}.'
      specs.append({
        'layers': [i for i, x in enumerate(layers) if x == name],
        'num_heads': ours.get(f'{options}num_heads'),
        'num_kv_heads': ours.get(f'{options}num_kv_heads'),
        'qkv_bias': ours.get(f'{options}qkv_bias'),
        'window_size': ours.get(f'{options}window', None),
        'rope_theta': ours.get(f'{options}rotary.base'),
      })  # fmt: skip
    return {'attn': specs[0] if len(specs) == 1 else specs or None}


def _count(words, name, default=NEEDED):
  return read_value(Positive, word(words, name, default), name)


def _width(words):
  return _count(words, 'hidden_size', 2048)


def _share(words, name, default):
  return read_value(PositiveFloat, word(words, name, default), name)


def _specs(attn):
  specs = attn if isinstance(attn, list) else [attn] * (attn is not None)
  known = {
    'layers', 'num_heads', 'num_kv_heads', 'qkv_bias', 'window_size',
    'rope_theta',
  }  # fmt: skip
  for spec in specs:
    if not isinstance(spec, dict) or not known >= {*spec}:
      raise ConfigError(
        f'attn={spec!r} is not supported; its words are {", ".join(known)}'
      )
    if not isinstance(word(spec, 'layers'), list):
      raise ConfigError(f'attn.layers={spec["layers"]!r} must be a list')
  return specs


def ffn_dim(ratio: float = 4) -> Choice:
  """Returns the width of the ffn, by default of a multiple of 256."""

  def read(words):
    width = words.get('intermediate_size')
    if width is None:
      share = words.get('hidden_ratio', ratio)
      share = 4 if share is None else _share(words, 'hidden_ratio', ratio)
      width = int(_width(words) * share * 2 / 3)
      width = -(-width // 256) * 256
    return {'ffn_dim': width}

  def write(ours):
    return {'intermediate_size': ours.get('ffn_dim')}

  return Choice(('intermediate_size', 'hidden_ratio'), read, write)


def conv(mixer: str, used: bool) -> Choice:
  """Returns the width of the short convolution; `used` by default."""

  def read(words):
    width = words.get('conv_size', 4)
    width = width if words.get('use_short_conv', used) else 0
    return {f'mixers.{mixer}.conv_width': width}

  def write(ours):
    width = ours.get(f'mixers.{mixer}.conv_width')
    width = 4 if width is None else width
    return {'use_short_conv': width > 0, 'conv_size': width or 4}

  return Choice(('use_short_conv', 'conv_size'), read, write)


def key_value_heads(mixer: str, word_of_heads: str = 'num_kv_heads') -> Choice:
  """Returns heads of keys and values that are as many as those of queries."""

  def read(words):
    count = words.get(word_of_heads)
    if count not in (None, words.get('num_heads')):
      raise ConfigError(
        f'{word_of_heads}={count!r} is not supported for {mixer}; only that of '
        'num_heads is'
      )
    return {}

  return Choice((word_of_heads,), read, lambda _: {})


def value_heads(mixer: str, default: int) -> Choice:
  """Returns the heads, which may be more of values than of keys."""

  def read(words):
    keys = _count(words, 'num_heads', default)
    values = words.get('num_v_heads')
    values = keys if values is None else values
    return {
      f'mixers.{mixer}.num_heads': values,
      f'mixers.{mixer}.key_heads': keys,
    }

  def write(ours):
    return {
      'num_heads': ours.get(f'mixers.{mixer}.key_heads'),
      'num_v_heads': ours.get(f'mixers.{mixer}.num_heads'),
    }

  return Choice(('num_heads', 'num_v_heads'), read, write)


def head_dims(mixer: str, width: int, expand: float) -> Choice:
  """Returns the widths of heads: `head_dim`, and of values times `expand_v`."""

  def read(words):
    keys = _count(words, 'head_dim', width)
    values = int(keys * _share(words, 'expand_v', expand))
    return {
      f'mixers.{mixer}.key_dim': keys,
      f'mixers.{mixer}.value_dim': values,
    }

  def write(ours):
    keys = ours.get(f'mixers.{mixer}.key_dim')
    return {
      'head_dim': keys,
      'expand_v': ours.get(f'mixers.{mixer}.value_dim') / keys,
    }

  return Choice(('head_dim', 'expand_v'), read, write)


def expansions(mixer: str, heads: int) -> Choice:
  """Returns the widths of heads as shares of the width of the model."""
  sides = {'k': 'key_dim', 'v': 'value_dim'}

  def read(words):
    width = _width(words) / _count(words, 'num_heads', heads)
    return {
      f'mixers.{mixer}.{name}': int(_share(words, f'expand_{x}', 1) * width)
      for x, name in sides.items()
    }

  def write(ours):
    width = ours.get('d_model') / ours.get(f'mixers.{mixer}.num_heads')
    return {
      f'expand_{x}': ours.get(f'mixers.{mixer}.{name}') / width
      for x, name in sides.items()
    }

  return Choice(('expand_k', 'expand_v'), read, write)


def expanded_heads(mixer: str) -> Choice:
  """Returns heads whose width is `expand_ratio`, of keys and values alike."""

  def read(words):
    width, ratio = _width(words), words.get('expand_ratio', 128)
    if ratio is None:
      heads = _count(words, 'num_heads')
    else:
      heads = width // _count({'expand_ratio': ratio}, 'expand_ratio')
    if words.get('num_heads') not in (None, heads) or width % max(heads, 1):
      raise ConfigError(
        f'expand_ratio={ratio!r} and num_heads={words.get("num_heads")!r} are '
        f'not supported together; hidden_size={width} must be their product'
      )
    return {f'mixers.{mixer}.num_heads': heads}

  def write(ours):
    heads = ours.get(f'mixers.{mixer}.num_heads')
    return {'num_heads': heads, 'expand_ratio': ours.get('d_model') // heads}

  return Choice(('num_heads', 'expand_ratio'), read, write)


def decay_bound(mixer: str) -> Choice:
  """Returns the lowest log decay, if there is one."""
  ours = f'mixers.{mixer}.decay_bound'

  def read(words):
    bound = words.get('lower_bound')
    if words.get('safe_gate', False) != (bound is not None):
      raise ConfigError(
        f'safe_gate={words.get("safe_gate")!r} and lower_bound={bound!r} are '
        'not supported together; give both or neither'
      )
    if bound is None:
      return {ours: 0.0}
    return {ours: read_value(_Negative, bound, 'lower_bound')}

  def write(found):
    bound = found.get(ours) or None
    return {'safe_gate': bound is not None, 'lower_bound': bound}

  return Choice(('safe_gate', 'lower_bound'), read, write)
