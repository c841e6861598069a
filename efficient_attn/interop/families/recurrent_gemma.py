"""RecurrentGemma (2404.07839): Griffin's recurrences and local attention."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes

from efficient_attn.interop.families.llama import ACTIVATIONS, ATTENTION, FFN
from efficient_attn.interop.family import Family
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import Row, linear, norm, row
from efficient_attn.interop.words import (
  COUNT,
  Choice,
  Layers,
  Ours,
  Word,
  Words,
  choice,
  word,
)

KINDS = {'recurrent': 'rg_lru', 'attention': 'window'}
NAMES = {ours: theirs for theirs, ours in KINDS.items()}
DEFAULT = ('recurrent', 'recurrent', 'attention')


def _layers(words: Words) -> list[str]:
  """Returns the mixers of a list that repeats."""
  types = word(words, 'block_types', DEFAULT)
  kinds = [choice('block_types', kind, KINDS) for kind in types]
  return [kinds[i % len(kinds)] for i in range(words[COUNT])]


def _types(layers: Sequence[str]) -> dict[str, Any]:
  """Returns the list of all layers."""
  return {'block_types': [choice('model.pattern', x, NAMES) for x in layers]}


def _widths(words: Words) -> dict[str, Any]:
  """Returns the widths; embeddings are times a root in bfloat16."""
  width = word(words, 'hidden_size')
  inner = words.get('lru_width') or width
  return {
    'd_model': width,
    'mixers.rg_lru.expand': inner / width,
    'embedding.scale': float(ml_dtypes.bfloat16(width**0.5)),
  }


def _width_words(ours: Ours) -> dict[str, Any]:
  """Returns the widths as numbers of channels."""
  width = ours.get('d_model')
  inner = round(ours.get('mixers.rg_lru.expand', 1.0) * width)
  return {'hidden_size': width, 'lru_width': inner}


def _below(rows: tuple[Row, ...], name: str) -> tuple[Row, ...]:
  """Returns rows of attention as parts of the block of either kind."""
  return tuple(
    Row(
      tuple(x.replace('mixer.', 'window.') for x in found.ours),
      found.theirs.replace('self_attn', name),
      found.rule,
    )
    for found in rows
  )


RECURRENT_GEMMA = Family(
  architecture='RecurrentGemmaForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Choice(('hidden_size', 'lru_width'), _widths, _width_words),
    Word('num_hidden_layers', 'num_layers'),
    Word('num_attention_heads', 'num_heads', 10),
    Word('num_key_value_heads', 'mixers.window.num_kv_heads', None, {None: 0}),
    Word(
      'intermediate_size',
      'ffn_dim',
      convert=lambda width: width // 2,
      revert=lambda width: 2 * width,
    ),
    Layers(('block_types',), _layers, _types),
    Word('attention_window_size', 'mixers.window.window', 2048),
    Word('attention_bias', 'mixers.window.qkv_bias', False),
    Word('conv1d_width', 'mixers.rg_lru.conv_width', 4),
    Word('rms_norm_eps', 'norms.eps', 1e-6),
    Word('logits_soft_cap', 'logits.soft_cap', 30.0),
    Word(
      'hidden_activation',
      'activation',
      'gelu_pytorch_tanh',
      {'gelu_pytorch_tanh': ACTIVATIONS['gelu_pytorch_tanh']},
      strict=True,
    ),
    Word('tie_word_embeddings', 'tie_embeddings', True),
    Rope(fraction=0.5, kinds={'': 'window'}),
  ),
  ours={
    'ffn': 'glu',
    'ffn_bias': True,
    'norm': 'rmsnorm',
    'norms.zero_centered': True,
    'mixers.window.out_bias': True,
    'mixers.rg_lru.in_bias': True,
    'mixers.rg_lru.out_bias': True,
    'mixers.rg_lru.scale_first': False,
  },
  ends=(
    row('embed.table', 'model.embed_tokens.weight', 'v d -> v d'),
    row('norm.scale', 'model.final_norm.weight'),
    row('unembed.table', 'lm_head.weight', 'v d -> v d'),
  ),
  block='model.layers.{i}.',
  blocks=(
    *norm('mixer_norm', 'temporal_pre_norm'),
    *_below(ATTENTION, 'temporal_block'),
    *linear('rg_lru.value', 'temporal_block.linear_x', 'd', 'n h'),
    *linear('rg_lru.gate', 'temporal_block.linear_y', 'd', 'n h'),
    *linear('rg_lru.out', 'temporal_block.linear_out', 'n h', 'd'),
    row(
      'rg_lru.conv.weight',
      'temporal_block.conv_1d.weight',
      '(n h) 1 w -> w n h',
    ),
    row('rg_lru.conv.bias', 'temporal_block.conv_1d.bias', '(n h) -> n h'),
    row(
      'rg_lru.rate',
      'temporal_block.rg_lru.recurrent_param',
      '(n h) -> n h',
    ),
    row(
      'rg_lru.recurrence_gate.weight',
      'temporal_block.rg_lru.recurrent_gate_weight',
      'n h g -> n h g',
    ),
    row(
      'rg_lru.recurrence_gate.bias',
      'temporal_block.rg_lru.recurrent_gate_bias',
      'n h -> n h',
    ),
    row(
      'rg_lru.input_gate.weight',
      'temporal_block.rg_lru.input_gate_weight',
      'n h g -> n h g',
    ),
    row(
      'rg_lru.input_gate.bias',
      'temporal_block.rg_lru.input_gate_bias',
      'n h -> n h',
    ),
    *norm('ffn_norm', 'channel_pre_norm'),
    *(Row(x.ours, x.theirs.replace('mlp.', 'mlp_block.'), x.rule) for x in FFN),
  ),
  ignored=('final_w_init_variance_scale', 'w_init_variance_scale', 'head_dim'),
)
