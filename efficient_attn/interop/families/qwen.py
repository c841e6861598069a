"""Qwen2 (2407.10671) and Qwen3 (2505.09388)."""

import dataclasses

from efficient_attn.interop.families.llama import (
  COMMON,
  LLAMA,
)
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import row
from efficient_attn.interop.words import (
  FULL,
  SLIDING,
  Word,
  count_of,
  integer,
  layer_types,
)


def _default(words):
  """Layers have a window from `max_window_layers` on."""
  count = count_of(words)
  first = min(integer(words, 'max_window_layers', 28, low=0), count)
  if not words.get('use_sliding_window') or not words.get('sliding_window'):
    first = count
  return [FULL] * first + [SLIDING] * (count - first)


def _written(layers):
  return {'use_sliding_window': 'window' in layers}


LAYERS = (
  layer_types(
    _default,
    others=('max_window_layers', 'use_sliding_window'),
    written=_written,
  ),
  Word('sliding_window', 'mixers.window.window', None),
)

QWEN2 = dataclasses.replace(
  LLAMA,
  architecture='Qwen2ForCausalLM',
  words=(*COMMON, *LAYERS, Rope()),
  ours=LLAMA.ours | {'mixers.*.qkv_bias': True},
)

QWEN3 = dataclasses.replace(
  LLAMA,
  architecture='Qwen3ForCausalLM',
  words=(
    *COMMON,
    *LAYERS,
    Word('head_dim', 'mixers.*.head_dim', 128, {None: 0}),
    Word('rms_norm_eps', ('norms.eps', 'mixers.*.qk_norms.eps'), 1e-6),
    Word('attention_bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias'), False),
    Rope(),
  ),
  ours=LLAMA.ours | {'mixers.*.qk_norm': True},
  blocks=(
    *LLAMA.blocks,
    row('mixer.query_norm.scale', 'self_attn.q_norm.weight'),
    row('mixer.key_norm.scale', 'self_attn.k_norm.weight'),
  ),
)
