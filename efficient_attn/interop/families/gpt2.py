"""GPT-2 (Radford et al. 2019), whose matrices are [in, out]."""

from efficient_attn.interop.families.llama import ACTIVATIONS
from efficient_attn.interop.family import Family
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import Only, Word

GPT2 = Family(
  architecture='GPT2LMHeadModel',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('n_embd', 'd_model'),
    Word('n_layer', 'num_layers'),
    Word('n_head', 'num_heads'),
    Word('n_inner', 'ffn_dim', None, {None: 0}),
    Word('n_positions', 'max_len', 1024),
    Word('layer_norm_epsilon', 'norms.eps', 1e-5),
    Word(
      'activation_function', 'activation', 'gelu_new', ACTIVATIONS, strict=True
    ),
    Word('tie_word_embeddings', 'tie_embeddings', True),
    Word(
      'scale_attn_weights', 'mixers.*.scale', True, {True: None, False: 1.0}
    ),
    Only('scale_attn_by_inverse_layer_idx', False),
    Only('add_cross_attention', False),
  ),
  ours={
    'pattern': ('attention',),
    'position': 'learned',
    'embedding.scale': 1.0,
    'ffn': 'mlp',
    'ffn_bias': True,
    'norm': 'layernorm',
    'mixers.*.position': 'none',
    'mixers.*.qkv_bias': True,
    'mixers.*.out_bias': True,
  },
  ends=(
    row('embed.table', 'transformer.wte.weight', 'v d -> v d'),
    row('position.table', 'transformer.wpe.weight', 't d -> t d'),
    *norm('norm', 'transformer.ln_f'),
    row('unembed.table', 'lm_head.weight', 'v d -> v d'),
  ),
  block='transformer.h.{i}.',
  blocks=(
    *norm('mixer_norm', 'ln_1'),
    *linear(
      ('mixer.qkv.query', 'mixer.qkv.key', 'mixer.qkv.value'),
      'attn.c_attn',
      'd',
      'n h',
      rows='[n] h',
      transposed=True,
    ),
    *linear('mixer.out', 'attn.c_proj', 'n h', 'd', transposed=True),
    *norm('ffn_norm', 'ln_2'),
    *linear('ffn.up', 'mlp.c_fc', 'd', 'f', transposed=True),
    *linear('ffn.down', 'mlp.c_proj', 'f', 'd', transposed=True),
  ),
  prefix='transformer.',
  skip=('*.attn.bias', '*.attn.masked_bias'),
  ignored=('gradient_checkpointing', 'n_ctx', 'reorder_and_upcast_attn'),
)
