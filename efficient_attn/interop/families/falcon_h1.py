"""Falcon-H1 (2507.22448): Mamba-2 beside attention in every layer."""

import math
from typing import Any

from efficient_attn.config import ConfigError
from efficient_attn.interop.families.llama import ACTIVATIONS, ATTENTION, OURS
from efficient_attn.interop.families.mamba import TimeSteps, dual
from efficient_attn.interop.family import Family
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import Row, linear, norm, row
from efficient_attn.interop.words import Choice, Ours, Word, Words, word

BOTH = 'mixers.parallel'
MAMBA, ATTEND = f'{BOTH}.mixers.mamba2', f'{BOTH}.mixers.attention'


def _heads(words: Words) -> dict[str, Any]:
  """Returns the heads of Mamba-2, whose width may follow from others."""
  inner = word(words, 'mamba_d_ssm', 1024)
  if inner is None:
    inner = word(words, 'mamba_expand', 2) * word(words, 'hidden_size')
  heads = word(words, 'mamba_n_heads', 128)
  width = word(words, 'mamba_d_head', 'auto')
  width = inner // heads if width == 'auto' else width
  if heads * width != inner:
    raise ConfigError(
      f'mamba_d_head={width!r}: mamba_d_ssm={inner} are not {heads} heads of it'
    )
  return {f'{MAMBA}.num_heads': heads, f'{MAMBA}.head_dim': width}


def _head_words(ours: Ours) -> dict[str, Any]:
  """Returns the heads of Mamba-2."""
  heads, width = (ours.get(f'{MAMBA}.{x}') for x in ('num_heads', 'head_dim'))
  found = dict(mamba_n_heads=heads, mamba_d_head=width)
  return found | {'mamba_d_ssm': heads * width}


def _norm(words: Words) -> dict[str, Any]:
  """Returns where the norm of Mamba-2 is."""
  before = word(words, 'mamba_norm_before_gate', True)
  has = word(words, 'mamba_rms_norm', False)
  place = 'before_gate' if before else 'gated'
  return {f'{MAMBA}.norm': place if has else 'none'}


def _norm_words(ours: Ours) -> dict[str, Any]:
  """Returns both flags of the norm of Mamba-2."""
  place = ours.get(f'{MAMBA}.norm', 'gated')
  return {
    'mamba_rms_norm': place != 'none',
    'mamba_norm_before_gate': place != 'gated',
  }


def _scale(words: Words) -> dict[str, Any]:
  """Returns the width of heads of attention, and the scale of its logits."""
  heads = word(words, 'num_attention_heads')
  width = words.get('head_dim') or word(words, 'hidden_size') // heads
  factor = word(words, 'key_multiplier', 1.0)
  return {
    f'{ATTEND}.head_dim': width,
    f'{ATTEND}.scale': factor * width**-0.5,
  }


def _scale_words(ours: Ours) -> dict[str, Any]:
  """Returns the factor of keys whose product is the scale to the bit."""
  width, scale = (ours.get(f'{ATTEND}.{x}') for x in ('head_dim', 'scale'))
  near = scale / width**-0.5
  below, above = (math.nextafter(near, end) for end in (-math.inf, math.inf))
  factor = min((near, below, above), key=lambda x: abs(x * width**-0.5 - scale))
  return {'head_dim': width, 'key_multiplier': factor}


def _by_part(words: Words) -> dict[str, Any]:
  """Returns the factors of what enters and leaves both mixers and the ffn."""
  gate, down = word(words, 'mlp_multipliers', (1.0, 1.0))
  factors = word(words, 'ssm_multipliers', (1.0,) * 5)
  return {
    f'{BOTH}.input_scales.mamba2': word(words, 'ssm_in_multiplier', 1.0),
    f'{BOTH}.output_scales.mamba2': word(words, 'ssm_out_multiplier', 1.0),
    f'{BOTH}.input_scales.attention': word(
      words, 'attention_in_multiplier', 1.0
    ),
    f'{BOTH}.output_scales.attention': word(
      words, 'attention_out_multiplier', 1.0
    ),
    f'{MAMBA}.multipliers': tuple(factors),
    'ffns.glu.gate_scale': gate,
    'residuals.glu.branch': down,
  }


def _part_words(ours: Ours) -> dict[str, Any]:
  """Returns these factors."""
  enter, leave = f'{BOTH}.input_scales', f'{BOTH}.output_scales'
  return {
    'ssm_in_multiplier': ours.get(f'{enter}.mamba2', 1.0),
    'ssm_out_multiplier': ours.get(f'{leave}.mamba2', 1.0),
    'attention_in_multiplier': ours.get(f'{enter}.attention', 1.0),
    'attention_out_multiplier': ours.get(f'{leave}.attention', 1.0),
    'ssm_multipliers': list(ours.get(f'{MAMBA}.multipliers') or (1.0,) * 5),
    'mlp_multipliers': [
      ours.get('ffns.glu.gate_scale', 1.0),
      ours.get('residuals.glu.branch', 1.0),
    ],
  }


FALCON_H1 = Family(
  architecture='FalconH1ForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size', 'd_model'),
    Word('num_hidden_layers', 'num_layers'),
    Word('num_attention_heads', 'num_heads'),
    Word('intermediate_size', 'ffn_dim'),
    Word('max_position_embeddings', 'max_len', 8192),
    Word('num_key_value_heads', f'{ATTEND}.num_kv_heads', 8),
    Choice(('head_dim', 'key_multiplier'), _scale, _scale_words),
    Word('attention_bias', (f'{ATTEND}.qkv_bias', f'{ATTEND}.out_bias'), False),
    Choice(
      ('mamba_d_ssm', 'mamba_n_heads', 'mamba_d_head', 'mamba_expand'),
      _heads,
      _head_words,
    ),
    Word('mamba_d_state', f'{MAMBA}.state_dim', 256),
    Word('mamba_n_groups', f'{MAMBA}.groups', 1),
    Word('mamba_d_conv', f'{MAMBA}.conv_width', 4),
    Word('mamba_conv_bias', f'{MAMBA}.conv_bias', True),
    Word('mamba_proj_bias', f'{MAMBA}.in_bias', False),
    Word('projectors_bias', f'{MAMBA}.out_bias', False),
    Choice(('mamba_rms_norm', 'mamba_norm_before_gate'), _norm, _norm_words),
    TimeSteps(MAMBA),
    Choice(
      (
        'ssm_in_multiplier',
        'ssm_out_multiplier',
        'attention_in_multiplier',
        'attention_out_multiplier',
        'ssm_multipliers',
        'mlp_multipliers',
      ),
      _by_part,
      _part_words,
    ),
    Word('embedding_multiplier', 'embedding.scale', 1.0),
    Word('lm_head_multiplier', 'logits.scale', 1.0),
    Word('rms_norm_eps', ('norms.eps', f'{MAMBA}.norm_eps'), 1e-5),
    Word('hidden_act', 'activation', 'silu', ACTIVATIONS, strict=True),
    Word('mlp_bias', 'ffn_bias', False),
    Word('tie_word_embeddings', 'tie_embeddings', False),
    Rope(kinds={'': 'parallel.mixers.attention'}),
  ),
  ours={key: x for key, x in OURS.items() if key != 'embedding.scale'}
  | {'pattern': ('parallel',)},
  ends=(
    row('embed.table', 'model.embed_tokens.weight', 'v d -> v d'),
    row('norm.scale', 'model.final_layernorm.weight'),
    row('unembed.table', 'lm_head.weight', 'v d -> v d'),
  ),
  block='model.layers.{i}.',
  blocks=(
    *norm('mixer_norm', 'input_layernorm'),
    *dual('mixer.mixers.mamba2', 'mamba'),
    *(
      Row(
        tuple(
          name.replace('mixer.', 'mixer.mixers.attention.')
          for name in found.ours
        ),
        found.theirs,
        found.rule,
      )
      for found in ATTENTION
    ),
    *norm('ffn_norm', 'pre_ff_layernorm'),
    *linear('ffn.gate', 'feed_forward.gate_proj', 'd', 'f'),
    *linear('ffn.up', 'feed_forward.up_proj', 'd', 'f'),
    *linear('ffn.down', 'feed_forward.down_proj', 'f', 'd'),
  ),
  ignored=('mamba_chunk_size', 'mamba_use_mlp', 'num_logits_to_keep'),
)
