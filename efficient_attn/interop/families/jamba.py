"""Jamba (2403.19887): Mamba, and now and then attention without positions."""

from collections.abc import Sequence
from typing import Any

from efficient_attn.interop.families.experts import experts
from efficient_attn.interop.families.hybrids import dense, of
from efficient_attn.interop.families.llama import (
  ACTIVATIONS,
  ATTENTION,
  LLAMA,
)
from efficient_attn.interop.families.mamba import selective
from efficient_attn.interop.family import Family
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import (
  COUNT,
  Ffns,
  Layers,
  Word,
  Words,
  word,
)


def _every(words: Words, key: str, period: int, first: int) -> tuple[int, int]:
  """Returns how often a kind comes, and where first."""
  return (
    word(words, f'{key}_period', period),
    word(words, f'{key}_offset', first),
  )


def _places(found: list[int], count: int) -> tuple[int, int]:
  """Returns the period and the offset of the layers of a kind."""
  if len(found) > 1:
    return found[1] - found[0], found[0]
  return (count, found[0]) if found else (count + 1, count)


def _jamba_layers(words: Words) -> list[str]:
  """Returns attention where the period says so."""
  period, first = _every(words, 'attn_layer', 8, 4)
  return [
    'attention' if i % period == first else 'mamba' for i in range(words[COUNT])
  ]


def _jamba_layer_words(layers: Sequence[str]) -> dict[str, Any]:
  """Returns the period of attention."""
  found = [i for i, x in enumerate(layers) if x == 'attention']
  period, first = _places(found, len(layers))
  return {'attn_layer_period': period, 'attn_layer_offset': first}


def _jamba_ffns(words: Words) -> list[str]:
  """Returns mixtures where the period says so, if there are experts."""
  period, first = _every(words, 'expert_layer', 2, 1)
  some = word(words, 'num_experts', 16) > 1
  return [
    'moe' if some and i % period == first else 'glu'
    for i in range(words[COUNT])
  ]


def _jamba_ffn_words(ffns: Sequence[str]) -> dict[str, Any]:
  """Returns the period of mixtures."""
  found = [i for i, x in enumerate(ffns) if x == 'moe']
  period, first = _places(found, len(ffns))
  return {'expert_layer_period': period, 'expert_layer_offset': first}


JAMBA = Family(
  architecture='JambaForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size', 'd_model'),
    Word('num_hidden_layers', 'num_layers'),
    Word('num_attention_heads', 'num_heads'),
    Word('intermediate_size', 'ffn_dim'),
    Word('max_position_embeddings', 'max_len', 262_144),
    Word('num_key_value_heads', 'mixers.attention.num_kv_heads', 8, {None: 0}),
    Layers(
      ('attn_layer_period', 'attn_layer_offset'),
      _jamba_layers,
      _jamba_layer_words,
    ),
    Ffns(
      ('expert_layer_period', 'expert_layer_offset'),
      _jamba_ffns,
      _jamba_ffn_words,
    ),
    Word('num_experts', 'ffns.moe.num_experts', 16),
    Word('num_experts_per_tok', 'ffns.moe.top_k', 2),
    Word('router_aux_loss_coef', 'ffns.moe.router.balance_weight', 0.001),
    Word('mamba_d_state', 'mixers.mamba.d_state', 16),
    Word('mamba_d_conv', 'mixers.mamba.conv_width', 4),
    Word('mamba_expand', 'mixers.mamba.expand', 2),
    Word('mamba_dt_rank', 'mixers.mamba.dt_rank', 'auto', {'auto': 0}),
    Word('mamba_conv_bias', 'mixers.mamba.conv_bias', True),
    Word(
      'mamba_proj_bias',
      ('mixers.mamba.in_bias', 'mixers.mamba.out_bias'),
      False,
    ),
    Word('rms_norm_eps', ('norms.eps', 'mixers.mamba.norm_eps'), 1e-6),
    Word('hidden_act', 'activation', 'silu', ACTIVATIONS, strict=True),
    Word('tie_word_embeddings', 'tie_embeddings', False),
  ),
  ours=LLAMA.ours
  | {
    'ffns.moe.router.normalize': False,
    'mixers.attention.position': 'none',
    'mixers.mamba.select_norm': 'scaled',
  },
  ends=(
    row('embed.table', 'model.embed_tokens.weight', 'v d -> v d'),
    row('norm.scale', 'model.final_layernorm.weight'),
    row('unembed.table', 'lm_head.weight', 'v d -> v d'),
  ),
  block='model.layers.{i}.',
  blocks=(
    *norm('mixer_norm', 'input_layernorm'),
    *of('attention', ATTENTION),
    *selective('mamba', 'mamba'),
    row('mamba.select_norms.0.scale', 'mamba.dt_layernorm.weight'),
    row('mamba.select_norms.1.scale', 'mamba.b_layernorm.weight'),
    row('mamba.select_norms.2.scale', 'mamba.c_layernorm.weight'),
    *norm('ffn_norm', 'pre_ff_layernorm'),
    *dense('feed_forward'),
    *linear('moe.router', 'feed_forward.router', 'd', 'e'),
    *experts('feed_forward', ('gate_proj', 'up_proj', 'down_proj'))[2:],
  ),
  ignored=('use_associative_scan', 'use_mamba_kernels', 'use_mambapy'),
)
