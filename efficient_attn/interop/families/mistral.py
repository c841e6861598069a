"""Mistral (2310.06825): Llama with a window in every layer, or in none."""

import dataclasses

from efficient_attn.interop.families.llama import COMMON, LLAMA
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.words import Layers, Word, count_of


def _layers(words):
  window = words.get('sliding_window', 4096)
  return ['attention' if window is None else 'window'] * count_of(words)


def _words(layers):
  return {} if 'window' in layers else {'sliding_window': None}


MISTRAL = dataclasses.replace(
  LLAMA,
  architecture='MistralForCausalLM',
  words=(
    *COMMON,
    Word('sliding_window', 'mixers.window.window', 4096),
    Layers(('sliding_window',), _layers, _words),
    Rope(),
  ),
)
