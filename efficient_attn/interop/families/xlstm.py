"""xLSTM-7B (2503.13427)."""

from typing import Any

from efficient_attn.interop.family import Family
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import (
  Choice,
  Only,
  Ours,
  Word,
  Words,
  word,
)


def _ffn_dim(words: Words) -> dict[str, Any]:
  """Returns the width of the ffn, a multiple of a number."""
  width = word(words, 'hidden_size|embedding_dim')
  width *= word(words, 'ffn_proj_factor', 2.667)
  multiple = word(words, 'ffn_round_up_to_multiple_of', 64)
  return {'ffn_dim': int((width + multiple - 1) // multiple * multiple)}


def _ffn_words(ours: Ours) -> dict[str, Any]:
  """Returns a factor whose product needs no rounding."""
  return {
    'ffn_proj_factor': ours.get('ffn_dim') / ours.get('d_model'),
    'ffn_round_up_to_multiple_of': 1,
  }


XLSTM = Family(
  architecture='xLSTMForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size|embedding_dim', 'd_model'),
    Word('num_hidden_layers|num_blocks', 'num_layers'),
    Word('num_heads', 'num_heads', 8),
    Word('qk_dim_factor', 'mixers.*.expand_k', 0.5),
    Word('v_dim_factor', 'mixers.*.expand_v', 1.0),
    Word('gate_soft_cap', 'mixers.*.gate_cap', 15.0),
    Word('eps', 'mixers.*.eps', 1e-6),
    Word('norm_eps', ('norms.eps', 'mixers.*.norm_eps'), 1e-6),
    Word('output_logit_soft_cap', 'logits.soft_cap', 30.0),
    Word('tie_word_embeddings', 'tie_embeddings', False),
    Choice(
      ('ffn_proj_factor', 'ffn_round_up_to_multiple_of'), _ffn_dim, _ffn_words
    ),
    Only('use_bias', False),
    Only('add_out_norm', True),
    Only('weight_mode', 'single'),
  ),
  ours={
    'pattern': ('xlstm_7b',),
    'embedding.scale': 1.0,
    'ffn': 'glu',
    'norm': 'rmsnorm',
  },
  ends=(
    row('embed.table', 'backbone.embeddings.weight', 'v d -> v d'),
    row('norm.scale', 'backbone.out_norm.weight'),
    row('unembed.table', 'lm_head.weight', 'v d -> v d'),
  ),
  block='backbone.blocks.{i}.',
  blocks=(
    *norm('mixer_norm', 'norm_mlstm'),
    *linear('mixer.qkv.query', 'mlstm_layer.q', 'd', 'n h'),
    *linear('mixer.qkv.key', 'mlstm_layer.k', 'd', 'n h'),
    *linear('mixer.qkv.value', 'mlstm_layer.v', 'd', 'n h'),
    *linear('mixer.gate', 'mlstm_layer.ogate_preact', 'd', 'n h'),
    *linear('mixer.input_gate', 'mlstm_layer.igate_preact', 'd', 'n'),
    *linear('mixer.forget_gate', 'mlstm_layer.fgate_preact', 'd', 'n'),
    row('mixer.input_bias', 'mlstm_layer.igate_preact.bias'),
    row('mixer.forget_bias', 'mlstm_layer.fgate_preact.bias'),
    row(
      'mixer.norm.scale', 'mlstm_layer.multihead_norm.weight', '(n h) -> n h'
    ),
    *linear('mixer.out', 'mlstm_layer.out_proj', 'n h', 'd'),
    *norm('ffn_norm', 'norm_ffn'),
    *linear('ffn.gate', 'ffn.proj_up_gate', 'd', 'f'),
    *linear('ffn.up', 'ffn.proj_up', 'd', 'f'),
    *linear('ffn.down', 'ffn.proj_down', 'f', 'd'),
  ),
  prefix='backbone.',
  ignored=(
    'autocast_kernel_dtype',
    'chunk_size',
    'chunkwise_kernel',
    'inference_state_dtype',
    'max_inference_chunksize',
    'mode',
    'norm_reduction_force_float32',
    'return_last_states',
    'sequence_kernel',
    'step_kernel',
  ),
)
