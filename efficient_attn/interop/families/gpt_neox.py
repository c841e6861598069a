"""GPT-NeoX and Pythia (2204.06745, 2304.01373): halves in parallel."""

from efficient_attn.interop.families.llama import ACTIVATIONS
from efficient_attn.interop.family import Family
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import Word

GPT_NEOX = Family(
  architecture='GPTNeoXForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size', 'd_model'),
    Word('num_hidden_layers', 'num_layers'),
    Word('num_attention_heads', 'num_heads'),
    Word('intermediate_size', 'ffn_dim'),
    Word('max_position_embeddings', 'max_len', 2048),
    Word('layer_norm_eps', 'norms.eps', 1e-5),
    Word('hidden_act', 'activation', 'gelu', ACTIVATIONS, strict=True),
    Word('tie_word_embeddings', 'tie_embeddings', False),
    Word('attention_bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias'), True),
    Word(
      'use_parallel_residual',
      'parallel',
      True,
      {True: 'own_norms', False: 'none'},
    ),
    Rope(
      fraction=0.25,
      thetas='rope_theta|rotary_emb_base',
      fractions='partial_rotary_factor|rotary_pct',
    ),
  ),
  ours={
    'pattern': ('attention',),
    'embedding.scale': 1.0,
    'ffn': 'mlp',
    'ffn_bias': True,
    'norm': 'layernorm',
  },
  ends=(
    row('embed.table', 'gpt_neox.embed_in.weight', 'v d -> v d'),
    *norm('norm', 'gpt_neox.final_layer_norm'),
    row('unembed.table', 'embed_out.weight|lm_head.weight', 'v d -> v d'),
  ),
  block='gpt_neox.layers.{i}.',
  blocks=(
    *norm('mixer_norm', 'input_layernorm'),
    *norm('ffn_norm', 'post_attention_layernorm'),
    *linear(
      ('mixer.qkv.query', 'mixer.qkv.key', 'mixer.qkv.value'),
      'attention.query_key_value',
      'd',
      'n h',
      rows='n [x] h',
    ),
    *linear('mixer.out', 'attention.dense', 'n h', 'd'),
    *linear('ffn.up', 'mlp.dense_h_to_4h', 'd', 'f'),
    *linear('ffn.down', 'mlp.dense_4h_to_h', 'f', 'd'),
  ),
  prefix='gpt_neox.',
  skip=(
    '*.attention.bias',
    '*.attention.masked_bias',
    '*.rotary_emb.inv_freq',
  ),
)
