"""Falcon (2311.16867): three generations under one name.

The first has ALiBi and no parallel halves (falcon-rw), the second one key for
all queries and one norm for both halves (7B), the third groups of queries with
a key each and a norm for each half (40B, 180B). The original rounds ALiBi to
bfloat16 token by token, which is exact up to 256 tokens where the slopes are.
"""

from efficient_attn.interop.families.llama import ACTIVATIONS
from efficient_attn.interop.family import Family
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import Choice, Only, Word, word

# Names of the norms, by `parallel`.
MIXER_NORM = {
  'none': 'input_layernorm',
  'shared_norm': 'input_layernorm',
  'own_norms': 'ln_attn',
}
FFN_NORM = {
  'none': 'post_attention_layernorm',
  'shared_norm': '',
  'own_norms': 'ln_mlp',
}


def _parallel(words):
  if words.get('new_decoder_architecture', False):
    count = words.get('num_ln_in_parallel_attn')
    return 'shared_norm' if count == 1 else 'own_norms'
  return 'shared_norm' if words.get('parallel_attn', True) else 'none'


def _kv_heads(words):
  if words.get('new_decoder_architecture', False):
    return word(words, 'num_kv_heads')
  if words.get('multi_query', True):
    return 1
  return word(words, 'num_attention_heads|n_head')


def _read(words):
  return {
    'parallel': _parallel(words),
    'mixers.*.num_kv_heads': _kv_heads(words),
    'mixers.*.position': 'alibi' if words.get('alibi', False) else 'rotary',
  }


def _write(ours):
  parallel = ours.get('parallel')
  queries, keys = ours.get('num_heads'), ours.get('mixers.*.num_kv_heads')
  new = parallel == 'own_norms' or keys not in (1, queries)
  return {
    'new_decoder_architecture': new,
    'num_ln_in_parallel_attn': 1 + (parallel == 'own_norms') if new else None,
    'parallel_attn': parallel != 'none',
    'multi_query': keys == 1,
    'num_kv_heads': keys,
    'alibi': ours.get('mixers.*.position') == 'alibi',
  }


def _indices(config):
  return {
    'mixer_norm': (MIXER_NORM[config.parallel],) * config.num_layers,
    'ffn_norm': (FFN_NORM[config.parallel],) * config.num_layers,
  }


FALCON = Family(
  architecture='FalconForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size', 'd_model'),
    Word('num_hidden_layers|n_layer', 'num_layers'),
    Word('num_attention_heads|n_head', 'num_heads'),
    Word('ffn_hidden_size', 'ffn_dim', None, {None: 0}),
    Word('max_position_embeddings', 'max_len', 2048),
    Word('layer_norm_epsilon', 'norms.eps', 1e-5),
    Word('activation', 'activation', 'gelu', ACTIVATIONS, strict=True),
    Word('tie_word_embeddings', 'tie_embeddings', True),
    Word('bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias', 'ffn_bias'), False),
    Choice(
      (
        'new_decoder_architecture', 'num_ln_in_parallel_attn', 'parallel_attn',
        'multi_query', 'num_kv_heads', 'alibi',
      ),
      _read,
      _write,
    ),
    Only('apply_residual_connection_post_layernorm', False),
    Rope(),
  ),
  ours={
    'pattern': ('attention',),
    'embedding.scale': 1.0,
    'ffn': 'mlp',
    'norm': 'layernorm',
    'mixers.*.alibi.scaled': True,
  },
  ends=(
    row('embed.table', 'transformer.word_embeddings.weight', 'v d -> v d'),
    *norm('norm', 'transformer.ln_f'),
    row('unembed.table', 'lm_head.weight', 'v d -> v d'),
  ),
  block='transformer.h.{i}.',
  blocks=(
    *norm('mixer_norm', '{mixer_norm}'),
    *norm('ffn_norm', '{ffn_norm}'),
    *linear(
      ('mixer.qkv.query', 'mixer.qkv.key', 'mixer.qkv.value'),
      'self_attention.query_key_value',
      'd',
      '(k g) h, k h, k h',
      rows='k [g] h',
    ),
    *linear('mixer.out', 'self_attention.dense', 'n h', 'd'),
    *linear('ffn.up', 'mlp.dense_h_to_4h', 'd', 'f'),
    *linear('ffn.down', 'mlp.dense_4h_to_h', 'f', 'd'),
  ),
  prefix='transformer.',
  skip=('*.rotary_emb.inv_freq',),
  indices=_indices,
)  # fmt: skip
