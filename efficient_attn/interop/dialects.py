"""config.json of libraries that have other words for a family's models.

state-spaces/mamba names no `model_type`, and `mamba2` of flash-linear-attention
(fla) is that of transformers in other words. Both are translated when they are
read; what is saved has the words of the family.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from efficient_attn.config import ConfigError
from efficient_attn.interop.words import IGNORED, NEEDED, Words, word
from efficient_attn.values import Positive, choose, nearest, read_value


class Dialect(NamedTuple):
  """Tells a dialect from others, and translates it.

  Attributes:
    library: that writes it.
    marks: words that it alone has, and their values; None: any.
    words: theirs to those of the family.
    fixed: words that may have one value, the default of the library.
    ignored: words that change no logits.
    derived: from all words, those that do not translate one by one.
  """

  library: str
  marks: Mapping[str, Any]
  words: Mapping[str, str]
  fixed: Mapping[str, Any]
  ignored: frozenset[str]
  derived: Callable[[Words], dict[str, Any]]

  def speaks(self, words: Words) -> bool:
    """Tells whether words are of the dialect."""
    return all(
      name in words and value in (None, words[name])
      for name, value in self.marks.items()
    )

  def translate(self, words: Words) -> dict[str, Any]:
    """Returns the words of the family."""
    known = {*self.words, *self.fixed, *self.ignored, *self.marks, *IGNORED}
    for name, value in words.items():
      if name not in known:
        raise ConfigError(
          f'{name}={value!r} is not supported; {nearest(name, known)}'
        )
    for name, value in self.fixed.items():
      if words.get(name, value) != value:
        raise ConfigError(
          f'{name}={words[name]!r} is not supported; only {value!r} is'
        )
    found = {new: words[old] for old, new in self.words.items() if old in words}
    return found | self.derived(words)


# Of the arguments of the layers of state-spaces/mamba.
_SSM = {
  'Mamba1': {
    'd_state': 'state_size',
    'd_conv': 'conv_kernel',
    'expand': 'expand',
    'dt_rank': 'time_step_rank',
    'conv_bias': 'use_conv_bias',
    'bias': 'use_bias',
  },
  'Mamba2': {
    'd_state': 'state_size',
    'd_conv': 'conv_kernel',
    'expand': 'expand',
    'headdim': 'head_dim',
    'ngroups': 'n_groups',
    'dt_limit': 'time_step_limit',
    'conv_bias': 'use_conv_bias',
    'bias': 'use_bias',
  },
}
_SSM_IGNORED = {
  'A_init_range', 'chunk_size', 'conv_init', 'dt_init', 'dt_init_floor',
  'dt_max', 'dt_min', 'dt_scale', 'use_fast_path', 'use_mem_eff_path',
}  # fmt: skip
_SSM_FIXED = {'D_has_hdim': False, 'norm_before_gate': False, 'rmsnorm': True}


def _state_spaces(words):
  """Reads `ssm_cfg`, and pads the vocabulary."""
  if not isinstance(words['ssm_cfg'], Mapping):
    raise ConfigError(f'ssm_cfg={words["ssm_cfg"]!r} must be a JSON object')
  options = dict(words['ssm_cfg'])
  layer = options.pop('layer', 'Mamba1')
  renamed = choose('ssm_cfg.layer', layer, _SSM)
  inner = Dialect(
    'state-spaces/mamba',
    marks={},
    words=renamed,
    fixed=_SSM_FIXED if layer == 'Mamba2' else {},
    ignored=frozenset(_SSM_IGNORED),
    derived=lambda _: {},
  )
  multiple = _size(words, 'pad_vocab_size_multiple', 8)
  rows = -(-_size(words, 'vocab_size') // multiple) * multiple
  found = inner.translate(options) | {'vocab_size': rows}
  found.setdefault('tie_word_embeddings', words.get('tie_embeddings', True))
  if layer == 'Mamba1':
    return found | {'model_type': 'mamba'}
  found = {'n_groups': 1, 'model_type': 'mamba2'} | found
  return found | _heads(found, _size(words, 'd_model'))


def _heads(words, width):
  """Returns the heads, whose number other words make."""
  expand, head_dim = _size(words, 'expand', 2), _size(words, 'head_dim', 64)
  heads = expand * width // head_dim
  return {'expand': expand, 'head_dim': head_dim, 'num_heads': heads}


def _size(words, name, default=NEEDED):
  """Returns a word that is a positive number."""
  return read_value(Positive, word(words, name, default), name)


def _fla_mamba2(words):
  """Fills in the defaults of fla, which differ from those of transformers."""
  return _heads(words, _size(words, 'hidden_size')) | {
    'model_type': 'mamba2',
    'n_groups': words.get('n_groups', 1),
    'tie_word_embeddings': words.get('tie_word_embeddings', False),
  }


_SAME = (
  'vocab_size', 'hidden_size', 'num_hidden_layers', 'state_size', 'conv_kernel',
  'use_bias', 'use_conv_bias', 'hidden_act', 'dtype', 'torch_dtype',
)  # fmt: skip

DIALECTS = (
  Dialect(
    'state-spaces/mamba',
    marks={'ssm_cfg': None, 'd_model': None, 'n_layer': None},
    words={
      'd_model': 'hidden_size',
      'n_layer': 'num_hidden_layers',
      'tie_embeddings': 'tie_word_embeddings',
    },
    fixed={'rms_norm': True, 'attn_layer_idx': [], 'd_intermediate': 0},
    ignored=frozenset(
      (
        'attn_cfg',
        'fused_add_norm',
        'pad_vocab_size_multiple',
        'residual_in_fp32',
        'vocab_size',
      )
    ),  # fmt: skip
    derived=_state_spaces,
  ),
  Dialect(
    'fla',
    marks={'model_type': 'mamba2', 'norm_eps': None},
    words={name: name for name in _SAME}
    | {'norm_eps': 'layer_norm_epsilon', 'dt_limit': 'time_step_limit'},
    fixed=_SSM_FIXED,
    ignored=frozenset(
      (
        'expand',
        'fuse_cross_entropy',
        'fuse_linear_cross_entropy',
        'fuse_norm',
        'head_dim',
        'n_groups',
        'num_heads',
        'rescale_prenorm_residual',
        'residual_in_fp32',
        'tie_word_embeddings',
        'use_l2warp',
        *_SSM_IGNORED,
      )
    ),  # fmt: skip
    derived=_fla_mamba2,
  ),
)


def is_known(words: Words) -> bool:
  """Tells a config.json of weights from another one."""
  return 'model_type' in words or any(x.speaks(words) for x in DIALECTS)


def translated(words: Words) -> dict[str, Any]:
  """Returns a config.json in the words of a family."""
  for dialect in DIALECTS:
    if dialect.speaks(words):
      return dialect.translate(words)
  return dict(words)
