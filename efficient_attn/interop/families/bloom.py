"""BLOOM (2211.05100): ALiBi, and a norm behind the embeddings."""

from efficient_attn.interop.family import Family
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import Only, Word

BLOOM = Family(
  architecture='BloomForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size|n_embed', 'd_model'),
    Word('n_layer|num_hidden_layers', 'num_layers'),
    Word('n_head|num_attention_heads', 'num_heads'),
    Word('layer_norm_epsilon', 'norms.eps', 1e-5),
    Word('tie_word_embeddings', 'tie_embeddings', True),
    Word(
      'apply_residual_connection_post_layernorm',
      'norm_position',
      False,
      {False: 'pre', True: 'normed'},
    ),
    Only('slow_but_exact', False),
  ),
  ours={
    'pattern': ('attention',),
    'embedding.scale': 1.0,
    'embedding.norm': True,
    'ffn': 'mlp',
    'ffn_bias': True,
    'activation': 'gelu_tanh',
    'norm': 'layernorm',
    'mixers.*.position': 'alibi',
    'mixers.*.qkv_bias': True,
    'mixers.*.out_bias': True,
  },
  ends=(
    row('embed.table', 'transformer.word_embeddings.weight', 'v d -> v d'),
    *norm('embed_norm', 'transformer.word_embeddings_layernorm'),
    *norm('norm', 'transformer.ln_f'),
    row('unembed.table', 'lm_head.weight', 'v d -> v d'),
  ),
  block='transformer.h.{i}.',
  blocks=(
    *norm('mixer_norm', 'input_layernorm'),
    *norm('ffn_norm', 'post_attention_layernorm'),
    *linear(
      ('mixer.qkv.query', 'mixer.qkv.key', 'mixer.qkv.value'),
      'self_attention.query_key_value',
      'd',
      'n h',
      rows='n [x] h',
    ),
    *linear('mixer.out', 'self_attention.dense', 'n h', 'd'),
    *linear('ffn.up', 'mlp.dense_h_to_4h', 'd', 'f'),
    *linear('ffn.down', 'mlp.dense_4h_to_h', 'f', 'd'),
  ),
  prefix='transformer.',
  ignored=(
    'attention_softmax_in_fp32', 'bias_dropout_fusion', 'masked_softmax_fusion',
    'n_inner', 'offset_alibi', 'seq_length', 'skip_bias_add',
    'skip_bias_add_qkv', 'unk_token_id',
  ),
)  # fmt: skip
