"""Kimi Linear (2510.26692): KDA, with every fourth layer of latent attention.

Files as published have `linear_attn_config`, whose layers count from one.
"""

from collections.abc import Sequence
from typing import Any

from efficient_attn.interop.families.deepseek import MLA
from efficient_attn.interop.families.experts import experts
from efficient_attn.interop.families.hybrids import (
  LINEAR,
  conv,
  dense,
  of,
  shared,
)
from efficient_attn.interop.families.llama import ACTIVATIONS, LLAMA, NORMS
from efficient_attn.interop.family import Family
from efficient_attn.interop.table import linear, row
from efficient_attn.interop.words import (
  COUNT,
  FULL,
  Choice,
  Ffns,
  Layers,
  Only,
  Ours,
  Word,
  Words,
  by_layer,
  choice,
  word,
)

KINDS = {FULL: 'mla', LINEAR: 'kda'}
BACK = {ours: theirs for theirs, ours in KINDS.items()}
FFNS = {'dense': 'glu', 'sparse': 'moe'}
MIX = 'block_sparse_moe'


def _layers(words: Words) -> list[str]:
  """Returns the mixers, by the older list of layers if there is one."""
  old = words.get('linear_attn_config')
  if old:
    return [
      'mla' if i in old['full_attn_layers'] else 'kda'
      for i in range(1, words[COUNT] + 1)
    ]
  kinds = by_layer(
    'layer_types',
    words,
    lambda _: [
      FULL if i and i % 4 == 0 else LINEAR for i in range(words[COUNT])
    ],
  )
  return [choice('layer_types', kind, KINDS) for kind in kinds]


def _layer_words(layers: Sequence[str]) -> dict[str, Any]:
  """Returns the kinds of the layers."""
  return {'layer_types': [choice('model.pattern', x, BACK) for x in layers]}


def _heads(words: Words) -> dict[str, Any]:
  """Returns the sizes of KDA."""
  old = words.get('linear_attn_config') or {}
  width = old.get('head_dim', word(words, 'linear_head_dim', 128))
  return {
    'mixers.kda.num_heads': old.get(
      'num_heads', word(words, 'linear_num_heads', 32)
    ),
    'mixers.kda.key_dim': width,
    'mixers.kda.value_dim': width,
    'mixers.kda.conv_width': old.get(
      'short_conv_kernel_size', word(words, 'linear_conv_kernel_dim', 4)
    ),
  }


def _head_words(ours: Ours) -> dict[str, Any]:
  """Returns the sizes of KDA."""
  return {
    'linear_num_heads': ours.get('mixers.kda.num_heads', 32),
    'linear_head_dim': ours.get('mixers.kda.key_dim', 128),
    'linear_conv_kernel_dim': ours.get('mixers.kda.conv_width', 4),
  }


def _ffns(words: Words) -> list[str]:
  """Returns the ffns, of which the first may be dense."""
  first = words.get('first_k_dense_replace', 1)
  kinds = by_layer(
    'mlp_layer_types',
    words,
    lambda _: ['dense' if i < first else 'sparse' for i in range(words[COUNT])],
  )
  return [choice('mlp_layer_types', kind, FFNS) for kind in kinds]


def _ffn_words(ffns: Sequence[str]) -> dict[str, Any]:
  """Returns the kinds of the ffns."""
  return {
    'mlp_layer_types': ['dense' if x == 'glu' else 'sparse' for x in ffns]
  }


def _widths(words: Words) -> dict[str, Any]:
  """Returns the widths of experts; shared ones are as one."""
  width = word(words, 'moe_intermediate_size', 1024)
  count = word(words, 'num_shared_experts', 1)
  return {'ffns.moe.ffn_dim': width, 'ffns.moe.shared_dim': count * width}


def _width_words(ours: Ours) -> dict[str, Any]:
  """Returns the width of experts, and how many are shared."""
  width = ours.get('ffns.moe.ffn_dim', 1024)
  count = ours.get('ffns.moe.shared_dim', width) // width
  return {'moe_intermediate_size': width, 'num_shared_experts': count}


KDA = (
  *linear('kda.qkv.query', 'self_attn.q_proj', 'd', 'n h'),
  *linear('kda.qkv.key', 'self_attn.k_proj', 'd', 'n h'),
  *linear('kda.qkv.value', 'self_attn.v_proj', 'd', 'n h'),
  conv('kda.qkv.convs.0', 'self_attn.q_conv1d'),
  conv('kda.qkv.convs.1', 'self_attn.k_conv1d'),
  conv('kda.qkv.convs.2', 'self_attn.v_conv1d'),
  *linear('kda.beta', 'self_attn.b_proj', 'd', 'n'),
  *linear('kda.gate.project.down', 'self_attn.f_a_proj', 'd', 'r'),
  *linear('kda.gate.project.up', 'self_attn.f_b_proj', 'r', 'n h'),
  row('kda.gate.dt_bias', 'self_attn.dt_bias', '(n h) -> n h'),
  row('kda.gate.a_log', 'self_attn.A_log', '1 1 n 1 -> n'),
  *linear('kda.out.gate.down', 'self_attn.g_a_proj', 'd', 'r'),
  *linear('kda.out.gate.up', 'self_attn.g_b_proj', 'r', 'n h'),
  row('kda.out.norm.scale', 'self_attn.o_norm.weight'),
  *linear('kda.out.out', 'self_attn.o_proj', 'n h', 'd'),
)

KIMI_LINEAR = Family(
  architecture='KimiLinearForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size', 'd_model'),
    Word('num_hidden_layers', 'num_layers'),
    Word('num_key_value_heads', 'num_heads', 32),
    Word('num_attention_heads', 'num_heads'),
    Word('intermediate_size', 'ffn_dim'),
    Layers(('layer_types', 'linear_attn_config'), _layers, _layer_words),
    Choice(
      ('linear_num_heads', 'linear_head_dim', 'linear_conv_kernel_dim'),
      _heads,
      _head_words,
    ),
    Only('q_lora_rank', None),
    Word('kv_lora_rank', 'mixers.mla.kv_rank', 512),
    Word('qk_nope_head_dim', 'mixers.mla.nope_dim', 128),
    Word('qk_rope_head_dim', 'mixers.mla.rope_dim', 64),
    Word('v_head_dim', 'mixers.mla.value_dim', 128),
    Ffns(('mlp_layer_types', 'first_k_dense_replace'), _ffns, _ffn_words),
    Word('num_experts', 'ffns.moe.num_experts', 256),
    Word('num_experts_per_token', 'ffns.moe.top_k', 8),
    Choice(
      ('moe_intermediate_size', 'num_shared_experts'), _widths, _width_words
    ),
    Word('moe_renormalize', 'ffns.moe.router.normalize', True),
    Word('routed_scaling_factor', 'ffns.moe.router.scale', 2.446),
    Word('num_expert_group', 'ffns.moe.router.groups', 1),
    Word('topk_group', 'ffns.moe.router.top_groups', 1),
    Word('rms_norm_eps', ('norms.eps', 'mixers.kda.norm_eps'), 1e-5),
    Word('hidden_act', 'activation', 'silu', ACTIVATIONS, strict=True),
    Only('attention_bias', False),
    Word('tie_word_embeddings', 'tie_embeddings', False),
  ),
  ours=LLAMA.ours
  | {
    'mixers.mla.position': 'none',
    'mixers.mla.q_rank': 0,
    'ffns.moe.router.scores': 'sigmoid',
    'ffns.moe.router.correction': True,
    'ffns.moe.router.group_best': 2,
  },
  ends=LLAMA.ends,
  block=LLAMA.block,
  blocks=(
    *NORMS,
    *KDA,
    *of('mla', MLA),
    *dense(MIX, 'mlp'),  # theirs writes the first and reads both
    *experts(MIX, ('w1', 'w3', 'w2')),
    row('moe.router.correction', f'{MIX}.gate.e_score_correction_bias'),
    *shared(f'{MIX}.shared_experts'),
  ),
  skip=LLAMA.skip,
  ignored=('head_dim', 'mla_use_nope', 'model_max_length', 'moe_layer_freq',
           'moe_router_activation_func', 'num_nextn_predict_layers',
           'qk_head_dim', 'rope_scaling', 'rope_theta', 'use_grouped_topk'),
  indices=lambda config: {'queries': ('q_proj',) * config.num_layers},
)  # fmt: skip
