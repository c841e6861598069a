"""SmolLM3 (2025): Llama with layers that know no positions."""

import dataclasses

from efficient_attn.interop.families.llama import COMMON, LLAMA
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.words import (
  FULL,
  KINDS,
  SLIDING,
  Layers,
  Word,
  by_layer,
  choice,
  count_of,
  integer,
)

NOPE = ':nope'  # behind the mixer of a layer without positions


def _rotated(words):
  period = integer(words, 'no_rope_layer_interval', 4)
  return [int(i % period != 0) for i in range(1, count_of(words) + 1)]


def _names(words):
  rotated = by_layer('no_rope_layers', words, _rotated)  # 1 says rotary
  window = words.get('use_sliding_window') and words.get('sliding_window')
  other = SLIDING if window else FULL
  kinds = by_layer(
    'layer_types', words, lambda _: [FULL if r else other for r in rotated]
  )
  return [
    choice('layer_types', kind, KINDS) + ('' if r else NOPE)
    for kind, r in zip(kinds, rotated, strict=True)
  ]


def _words(layers):
  return {
    'no_rope_layers': [int(not x.endswith(NOPE)) for x in layers],
    'layer_types': [SLIDING if 'window' in x else FULL for x in layers],
    'use_sliding_window': 'window' in ' '.join(layers),
  }


SMOLLM3 = dataclasses.replace(
  LLAMA,
  architecture='SmolLM3ForCausalLM',
  words=(
    *COMMON,
    Word('tie_word_embeddings', 'tie_embeddings', True),
    Word('attention_bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias'), False),
    Word('mlp_bias', 'ffn_bias', False),
    Layers(
      (
        'layer_types',
        'no_rope_layers',
        'no_rope_layer_interval',
        'use_sliding_window',
      ),
      _names,
      _words,
    ),
    Word(
      'sliding_window',
      ('mixers.window.window', 'mixers.window:nope.window'),
      None,
    ),
    Rope(base=2e6),
  ),
  ours=LLAMA.ours
  | {
    'mixers.attention:nope.position': 'none',
    'mixers.window:nope.position': 'none',
  },
  ignored=('max_window_layers',),
)
