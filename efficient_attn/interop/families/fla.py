"""Models of flash-linear-attention (fla 0.6), by the mixer of their layers."""

import dataclasses

from efficient_attn.interop.families.llama import ATTENTION, FFN
from efficient_attn.interop.family import Family
from efficient_attn.interop.fla_words import (
  IGNORED,
  Hybrid,
  conv,
  expanded_heads,
  ffn_dim,
  key_value_heads,
)
from efficient_attn.interop.table import Row, linear, norm, row
from efficient_attn.interop.words import Only, Part, Word


def attn(rows: tuple[Row, ...]) -> tuple[Row, ...]:
  """Returns rows of the names of fla."""
  return tuple(
    dataclasses.replace(x, theirs=x.theirs.replace('self_attn.', 'attn.'))
    for x in rows
  )


def whole(value: float) -> float:
  """Returns the int that a number is, where it is one."""
  return int(value) if value == int(value) else value


def family(
  architecture: str,
  mixer: str,
  words: tuple[Part, ...],
  rows: tuple[Row, ...],
  *,
  ratio: float = 4,
  ours: dict | None = None,
  **options,
) -> Family:
  """Returns the family of a mixer."""
  ignored = (*IGNORED, *options.pop('ignored', ()))
  return Family(
    architecture=architecture,
    words=(
      Word('vocab_size', 'vocab_size', 32000),
      Word('hidden_size', 'd_model', 2048),
      Word('num_hidden_layers', 'num_layers'),
      Hybrid(mixer),
      ffn_dim(ratio),
      Word('norm_eps', ('norms.eps', f'mixers.{mixer}.norm_eps'), 1e-6),
      Word('tie_word_embeddings', 'tie_embeddings', False),
      Only('hidden_act', 'swish'),
      Only('attnres_block_size', None),
      *words,
    ),
    ours={
      'num_heads': 1,
      'embedding.scale': 1.0,
      'ffn': 'glu',
      'norm': 'rmsnorm',
    }
    | (ours or {}),
    ends=(
      row('embed.table', 'model.embeddings.weight', 'v d -> v d'),
      *norm('norm', 'model.norm'),
      row('unembed.table', 'lm_head.weight', 'v d -> v d'),
    ),
    block='model.layers.{i}.',
    blocks=(
      *norm('mixer_norm', 'attn_norm'),
      *norm('ffn_norm', 'mlp_norm'),
      *attn(ATTENTION),
      *FFN,
      *rows,
    ),
    ignored=ignored,
    **options,
  )


CONVS = tuple(
  row(
    f'mixer.qkv.convs.{i}.weight',
    f'attn.{x}_conv1d.weight',
    '(n h) 1 w -> w n h',
  )
  for i, x in enumerate('qkv')
)
GATED = (
  *linear('mixer.out.gate', 'attn.g_proj', 'd', 'n h'),
  *linear('mixer.out.out', 'attn.o_proj', 'n h', 'd'),
)
SWISH_GATE = row('mixer.out.norm.scale', 'attn.g_norm_swish_gate.weight')
GLA = family(
  'GLAForCausalLM',
  'gla',
  (
    Word('num_heads', 'mixers.gla.num_heads', 4),
    Word('expand_k', 'mixers.gla.expand_k', 0.5),
    Word('expand_v', 'mixers.gla.expand_v', 1.0),
    key_value_heads('gla'),
    conv('gla', used=False),
    Only('feature_map', None),
    Only('use_output_gate', True),
    Only('clamp_min', None),
    Only('elementwise_affine', True),
    Only('fuse_norm', True),
  ),
  (
    *CONVS,
    *linear('mixer.gate.down', 'attn.gk_proj.0', 'd', 'r'),
    *linear('mixer.gate.up', 'attn.gk_proj.1', 'r', 'n h'),
    *GATED,
    SWISH_GATE,
  ),
)

RETNET = family(
  'RetNetForCausalLM',
  'retention',
  (
    Word('num_heads', 'mixers.retention.num_heads', 8),
    Only('expand_k', 1.0),
    Word('expand_v', 'mixers.retention.expand_v', 2.0, convert=whole),
    key_value_heads('retention'),
    Only('feature_map', None),
    Only('use_short_conv', False),
    Only('use_output_gate', True),
    Only('elementwise_affine', True),
    Only('fuse_norm', True),
  ),
  (*GATED, SWISH_GATE),
  ratio=2,
  ignored=('conv_size',),
)

GSA = family(
  'GSAForCausalLM',
  'gsa',
  (
    Word('num_heads', 'mixers.gsa.num_heads', 4),
    Word('num_slots', 'mixers.gsa.num_slots', 64),
    Word('gate_logit_normalizer', 'mixers.gsa.gate_temperature', 8),
    key_value_heads('gsa'),
    Only('feature_map', 'swish'),
    Only('expand_k', 1),
    Only('expand_v', 1),
    Only('exapnd_k', 1),  # as its constructor has it
    Only('exapnd_v', 1),
    Only('use_short_conv', False),
    Only('use_output_gate', False),
    Only('use_norm', True),
    Only('elementwise_affine', True),
  ),
  (
    *linear('mixer.query', 'attn.q_proj', 'd', 'n h'),
    *linear('mixer.key', 'attn.k_proj', 'd', 'n h'),
    *linear('mixer.value', 'attn.v_proj', 'd', 'n h'),
    *linear('mixer.decay', 'attn.f_proj', 'd', 'n s'),
    row('mixer.norm.scale', 'attn.g_norm.weight', '(n h) -> n h'),
  ),
  ignored=(
    'conv_size',
    'clamp_min',
    'clamp_max',
  ),
)

HGRN2 = family(
  'HGRN2ForCausalLM',
  'hgrn2',
  (
    expanded_heads('hgrn2'),
    Only('use_lower_bound', False, default=True),
    Only('use_short_conv', False),
    Only('elementwise_affine', True),
  ),
  (
    *linear('mixer.query', 'attn.q_proj', 'd', 'n h'),
    *linear('mixer.forget', 'attn.f_proj', 'd', 'n h'),
    *linear('mixer.value', 'attn.i_proj', 'd', 'n h'),
    row('mixer.norm.scale', 'attn.g_norm.weight', '(n h) -> n h'),
  ),
  ignored=('conv_size',),
)
