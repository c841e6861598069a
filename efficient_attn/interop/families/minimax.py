"""MiniMax-Text-01 (2501.08313): lightning attention and mixtures of experts.

Rates of lightning attention fall with depth, so each of its layers has a name.
"""

from typing import Any

from efficient_attn.interop.families.experts import CHOICE, experts
from efficient_attn.interop.families.hybrids import LINEAR, of
from efficient_attn.interop.families.llama import (
  ACTIVATIONS,
  ATTENTION,
  LLAMA,
  NORMS,
)
from efficient_attn.interop.family import Family
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, row
from efficient_attn.interop.words import (
  COUNT,
  FULL,
  Choice,
  Only,
  Ours,
  Word,
  Words,
  by_layer,
  choice,
  cycle,
  word,
)

KINDS = {FULL: 'attention', LINEAR: 'lightning'}
HALVES = {'full_attn': 'attention', 'linear_attn': 'lightning', 'mlp': 'moe'}
FACTORS = {'alpha': 'skip', 'beta': 'branch'}
THEIRS = tuple(f'{x}_{y}_factor' for x in HALVES for y in FACTORS)


def _layers(words: Words) -> dict[str, Any]:
  """Returns the mixers with their depths and residual factors."""
  count = words[COUNT]
  kinds = by_layer('layer_types', words, cycle(FULL, LINEAR))
  kinds = [choice('layer_types', kind, KINDS) for kind in kinds]
  names = [f'{x}:{i}' if x == 'lightning' else x for i, x in enumerate(kinds)]
  width = words.get('head_dim') or 0
  found = {'pattern': tuple(names), 'mixers.attention.head_dim': width}
  for_each = {
    f'mixers.{name}.{option}': value
    for i, name in enumerate(names)
    if name != 'attention'
    for option, value in (
      ('depth', i / (count - 1 + 1e-5)),
      ('head_dim', width),
    )
  }
  residuals = {
    f'residuals.{name}.{ours}': float(word(words, f'{half}_{theirs}_factor', 1))
    for half, kind in HALVES.items()
    for name in dict.fromkeys((*names, 'moe'))
    if name.partition(':')[0] == kind
    for theirs, ours in FACTORS.items()
  }
  return found | for_each | residuals


def _words(ours: Ours) -> dict[str, Any]:
  """Returns the kinds of the layers, the width of heads and the factors."""
  back = {kind: theirs for theirs, kind in KINDS.items()}
  rows = [name.partition(':')[0] for name in ours.layers]
  first = dict(reversed([*zip(rows, ours.layers, strict=True), ('moe', 'moe')]))
  return {
    'layer_types': [choice('model.pattern', x, back) for x in rows],
    'head_dim': ours.get('mixers.*.head_dim') or None,
  } | {
    f'{half}_{theirs}_factor': ours.get(f'residuals.{first[kind]}.{word}', 1.0)
    for half, kind in HALVES.items()
    if kind in first
    for theirs, word in FACTORS.items()
  }


MINIMAX = Family(
  architecture='MiniMaxForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size', 'd_model'),
    Word('num_hidden_layers', 'num_layers'),
    Word('num_attention_heads', 'num_heads'),
    Word('intermediate_size', 'ffn_dim'),
    Word('max_position_embeddings', 'max_len', 131_072),
    Word('num_key_value_heads', 'mixers.attention.num_kv_heads', 8),
    Choice(('layer_types', 'head_dim', *THEIRS), _layers, _words),
    Word('num_local_experts', 'ffns.moe.num_experts', 8),
    *CHOICE,
    Word('rms_norm_eps', 'norms.eps', 1e-5),
    Word('hidden_act', 'activation', 'silu', ACTIVATIONS, strict=True),
    Only('sliding_window', None),
    Word('tie_word_embeddings', 'tie_embeddings', False),
    Rope(base=1e6, kinds={FULL: 'attention'}),
  ),
  ours=LLAMA.ours | {'ffn': 'moe', 'norm_position': 'normed'},
  ends=LLAMA.ends,
  block=LLAMA.block,
  blocks=(
    *NORMS,
    *of('attention', ATTENTION),
    *linear(
      ('lightning.qkv.query', 'lightning.qkv.key', 'lightning.qkv.value'),
      'self_attn.qkv_proj',
      'd',
      'n h',
      rows='n [x] h',
    ),
    row('lightning.norm.scale', 'self_attn.norm.weight', '(n h) -> n h'),
    *linear('lightning.gate', 'self_attn.output_gate', 'd', 'n h'),
    *linear('lightning.out', 'self_attn.out_proj', 'n h', 'd'),
    *experts('block_sparse_moe', ('w1', 'w3', 'w2')),
  ),
  skip=(
    *LLAMA.skip,
    '*.slope_rate',
    '*.query_decay',
    '*.key_decay',
    '*.diagonal_decay',
  ),
  ignored=('block_size', 'rotary_dim', 'router_jitter_noise'),
)
