"""Qwen3-Next (2025): Gated DeltaNet, with every fourth layer of attention."""

from typing import Any

from efficient_attn.interop.families.experts import EXPERTS, QWEN3_MOE
from efficient_attn.interop.families.hybrids import LINEAR, dense, of, shared
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
  Ffns,
  Only,
  Word,
  Words,
  layer_types,
  word,
)

DELTA, ATTEND = 'gated_deltanet', 'attention'
EPS = (
  'norms.eps',
  f'mixers.{ATTEND}.qk_norms.eps',
  f'mixers.{DELTA}.norm_eps',
)
(SPARSE,) = (part for part in QWEN3_MOE.words if isinstance(part, Ffns))


def _default(words: Words) -> list[str]:
  """Returns attention in every so many layers."""
  every = word(words, 'full_attention_interval', 4)
  return [LINEAR if (i + 1) % every else FULL for i in range(words[COUNT])]


def _key_heads(config) -> dict[str, Any]:
  """Returns the heads of keys, by which rows of the file are in groups."""
  options = config.mixers.get(DELTA, {})
  heads = options.get('key_heads') or options.get('num_heads')
  return {'keys': (heads or config.num_heads,) * config.num_layers}


QWEN3_NEXT = Family(
  architecture='Qwen3NextForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size', 'd_model'),
    Word('num_hidden_layers', 'num_layers'),
    Word('num_attention_heads', 'num_heads'),
    Word('intermediate_size', 'ffn_dim'),
    Word('max_position_embeddings', 'max_len', 32_768),
    Word('num_key_value_heads', f'mixers.{ATTEND}.num_kv_heads', 2),
    Word('head_dim', f'mixers.{ATTEND}.head_dim', 256, {None: 0}),
    layer_types(
      _default,
      {FULL: ATTEND, LINEAR: DELTA},
      others=('full_attention_interval',),
    ),
    Word('linear_conv_kernel_dim', f'mixers.{DELTA}.conv_width', 4),
    Word('linear_key_head_dim', f'mixers.{DELTA}.key_dim', 128),
    Word('linear_value_head_dim', f'mixers.{DELTA}.value_dim', 128),
    Word('linear_num_key_heads', f'mixers.{DELTA}.key_heads', 16),
    Word('linear_num_value_heads', f'mixers.{DELTA}.num_heads', 32),
    SPARSE,
    Word('num_experts|num_local_experts', 'ffns.moe.num_experts', 512),
    Word('num_experts_per_tok', 'ffns.moe.top_k', 10),
    Word('moe_intermediate_size', 'ffns.moe.ffn_dim', 512),
    Word('shared_expert_intermediate_size', 'ffns.moe.shared_dim', 512),
    Word('norm_topk_prob', 'ffns.moe.router.normalize', True),
    Word('router_aux_loss_coef', 'ffns.moe.router.balance_weight', 0.001),
    Word('rms_norm_eps', EPS, 1e-6),
    Word('hidden_act', 'activation', 'silu', ACTIVATIONS, strict=True),
    Only('attention_bias', False),
    Word('tie_word_embeddings', 'tie_embeddings', False),
    Rope(fraction=0.25, kinds={FULL: ATTEND}),
  ),
  ours=LLAMA.ours
  | {
    'norms.zero_centered': True,
    'ffns.moe.shared_gate': True,
    f'mixers.{ATTEND}.qk_norm': True,
    f'mixers.{ATTEND}.qk_norms.zero_centered': True,
    f'mixers.{ATTEND}.gate': 'channel',
  },
  ends=LLAMA.ends,
  block=LLAMA.block,
  blocks=(
    *NORMS,
    *linear(
      (f'{ATTEND}.qkv.query', f'{ATTEND}.gate'),
      'self_attn.q_proj',
      'd',
      'n h',
      rows='n [x] h',
    ),
    *of(ATTEND, ATTENTION[2:]),
    row(f'{ATTEND}.query_norm.scale', 'self_attn.q_norm.weight'),
    row(f'{ATTEND}.key_norm.scale', 'self_attn.k_norm.weight'),
    row(
      tuple(
        f'{DELTA}.{part}.weight'
        for part in ('qkv.query', 'qkv.key', 'qkv.value', 'out.gate')
      ),
      'linear_attn.in_proj_qkvz.weight',
      '(k [r h]) d -> d k h, d k h, d (k r) h, d (k r) h',
    ),
    row(
      (f'{DELTA}.beta.weight', f'{DELTA}.gate.project.weight'),
      'linear_attn.in_proj_ba.weight',
      '({keys} [r]) d -> d ({keys} r)',
    ),
    row(
      tuple(f'{DELTA}.qkv.convs.{i}.weight' for i in range(3)),
      'linear_attn.conv1d.weight',
      '[n h] 1 w -> w n h',
    ),
    row(f'{DELTA}.gate.a_log', 'linear_attn.A_log'),
    row(f'{DELTA}.gate.dt_bias', 'linear_attn.dt_bias'),
    row(f'{DELTA}.out.norm.scale', 'linear_attn.norm.weight'),
    *linear(f'{DELTA}.out.out', 'linear_attn.out_proj', 'n h', 'd'),
    *dense('mlp'),
    *EXPERTS,
    *shared('mlp.shared_expert'),
    *linear('moe.shared_gate', 'mlp.shared_expert_gate', 'd', 'o'),
  ),
  skip=(*LLAMA.skip, 'mtp.*'),  # predicts one more token
  indices=_key_heads,
)
