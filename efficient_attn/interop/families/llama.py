"""Llama (2302.13971, 2307.09288, 2407.21783), on which many others build."""

from efficient_attn.interop.family import Family
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import Word

ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'relu': 'relu',
}

SIZES = (
  Word('vocab_size', 'vocab_size'),
  Word('hidden_size', 'd_model'),
  Word('num_hidden_layers', 'num_layers'),
  Word('num_attention_heads', 'num_heads'),
  Word('intermediate_size', 'ffn_dim'),
  Word('max_position_embeddings', 'max_len', 2048),
  Word('num_key_value_heads', 'mixers.*.num_kv_heads', None, {None: 0}),
  Word('head_dim', 'mixers.*.head_dim', None, {None: 0}),
)
COMMON = (
  *SIZES,
  Word('rms_norm_eps', 'norms.eps', 1e-6),
  Word('hidden_act', 'activation', 'silu', ACTIVATIONS, strict=True),
  Word('tie_word_embeddings', 'tie_embeddings', False),
)
OURS = {
  'pattern': ('attention',),
  'embedding.scale': 1.0,
  'ffn': 'glu',
  'norm': 'rmsnorm',
}
ENDS = (
  row('embed.table', 'model.embed_tokens.weight', 'v d -> v d'),
  row('norm.scale', 'model.norm.weight'),
  row('unembed.table', 'lm_head.weight', 'v d -> v d'),
)
ATTENTION = (
  *linear('mixer.qkv.query', 'self_attn.q_proj', 'd', 'n h'),
  *linear('mixer.qkv.key', 'self_attn.k_proj', 'd', 'n h'),
  *linear('mixer.qkv.value', 'self_attn.v_proj', 'd', 'n h'),
  *linear('mixer.out', 'self_attn.o_proj', 'n h', 'd'),
)
FFN = (
  *linear('ffn.gate', 'mlp.gate_proj', 'd', 'f'),
  *linear('ffn.up', 'mlp.up_proj', 'd', 'f'),
  *linear('ffn.down', 'mlp.down_proj', 'f', 'd'),
)
NORMS = (
  *norm('mixer_norm', 'input_layernorm'),
  *norm('ffn_norm', 'post_attention_layernorm'),
)

LLAMA = Family(
  architecture='LlamaForCausalLM',
  words=(
    *COMMON,
    Word('attention_bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias'), False),
    Word('mlp_bias', 'ffn_bias', False),
    Rope(),
  ),
  ours=OURS,
  ends=ENDS,
  block='model.layers.{i}.',
  blocks=(*NORMS, *ATTENTION, *FFN),
  skip=('*.rotary_emb.inv_freq',),
)
