"""LFM2 (2511.23404): gated short convolutions between layers of attention."""

from typing import Any

from efficient_attn.interop.families.llama import OURS
from efficient_attn.interop.family import Family
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import (
  COUNT,
  FULL,
  Choice,
  Ours,
  Word,
  Words,
  layer_types,
  word,
)


def _ffn_dim(words: Words) -> dict[str, Any]:
  """Returns the width of the ffn, two thirds of theirs rounded up."""
  width = word(words, 'block_ff_dim|intermediate_size', 12288)
  if word(words, 'block_auto_adjust_ff_dim', True):
    width = int(2 * width / 3)
    factor = word(words, 'block_ffn_dim_multiplier', 1.0)
    multiple = word(words, 'block_multiple_of', 256)
    if factor is not None:
      width = -(-int(factor * width) // multiple) * multiple
  return {'ffn_dim': width}


def _ffn_words(ours: Ours) -> dict[str, Any]:
  """Returns a width that is taken as it is."""
  return {
    'intermediate_size': ours.get('ffn_dim'),
    'block_auto_adjust_ff_dim': False,
  }


def _default(words: Words) -> list[str]:
  """Returns the kinds of layers by the indices of older files."""
  full = words.get('full_attn_idxs')
  full = range(words[COUNT]) if full is None else full
  return [FULL if i in full else 'conv' for i in range(words[COUNT])]


SIZES = (
  Word('vocab_size', 'vocab_size'),
  Word('hidden_size', 'd_model'),
  Word('num_hidden_layers', 'num_layers'),
  Word('num_attention_heads', 'num_heads'),
  Word('max_position_embeddings', 'max_len', 128_000),
)

LFM2 = Family(
  architecture='Lfm2ForCausalLM',
  words=(
    *SIZES,
    Choice(
      (
        'intermediate_size',
        'block_ff_dim',
        'block_auto_adjust_ff_dim',
        'block_ffn_dim_multiplier',
        'block_multiple_of',
      ),
      _ffn_dim,
      _ffn_words,
    ),
    layer_types(
      _default,
      {FULL: 'attention', 'conv': 'gated_conv'},
      others=('full_attn_idxs',),
    ),
    Word('num_key_value_heads', 'mixers.attention.num_kv_heads', 8),
    Word('conv_L_cache', 'mixers.gated_conv.conv_width', 3),
    Word('conv_bias', 'mixers.gated_conv.bias', False),
    Word('norm_eps', ('norms.eps', 'mixers.attention.qk_norms.eps'), 1e-5),
    Word('tie_word_embeddings|tie_embedding', 'tie_embeddings', True),
    Rope(base=1e6, kinds={FULL: 'attention'}),
  ),
  ours=OURS | {'mixers.attention.qk_norm': True},
  ends=(
    row('embed.table', 'model.embed_tokens.weight', 'v d -> v d'),
    row('norm.scale', 'model.embedding_norm.weight'),
    row('unembed.table', 'lm_head.weight', 'v d -> v d'),
  ),
  block='model.layers.{i}.',
  blocks=(
    *norm('mixer_norm', 'operator_norm'),
    *linear(
      ('gated_conv.input_gate', 'gated_conv.output_gate', 'gated_conv.value'),
      'conv.in_proj',
      'd',
      'n h',
      rows='[n] h',
    ),
    row('gated_conv.conv.weight', 'conv.conv.weight', '(n h) 1 w -> w n h'),
    row('gated_conv.conv.bias', 'conv.conv.bias', '(n h) -> n h'),
    *linear('gated_conv.out', 'conv.out_proj', 'n h', 'd'),
    *linear('attention.qkv.query', 'self_attn.q_proj', 'd', 'n h'),
    *linear('attention.qkv.key', 'self_attn.k_proj', 'd', 'n h'),
    *linear('attention.qkv.value', 'self_attn.v_proj', 'd', 'n h'),
    *linear('attention.out', 'self_attn.out_proj', 'n h', 'd'),
    row('attention.query_norm.scale', 'self_attn.q_layernorm.weight'),
    row('attention.key_norm.scale', 'self_attn.k_layernorm.weight'),
    *norm('ffn_norm', 'ffn_norm'),
    *linear('ffn.gate', 'feed_forward.w1', 'd', 'f'),
    *linear('ffn.up', 'feed_forward.w3', 'd', 'f'),
    *linear('ffn.down', 'feed_forward.w2', 'f', 'd'),
  ),
)
