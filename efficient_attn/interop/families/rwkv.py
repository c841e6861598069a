"""RWKV-4 (2305.13048).

Where `rescale_every` is not 0, their model divides its own weights when it runs
and so saves others; files as published have them as they are.
"""

from typing import Any

from efficient_attn.config import ConfigError
from efficient_attn.interop.families.mamba import Groups
from efficient_attn.interop.family import Family
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import Choice, Only, Word, Words, word


def _same_width(words: Words) -> dict[str, Any]:
  """Refuses layers of another width than the model."""
  width, inner = word(words, 'hidden_size'), words.get('attention_hidden_size')
  if inner not in (None, width):
    raise ConfigError(
      f'attention_hidden_size={inner!r} is not supported; only that of '
      f'hidden_size={width} is'
    )
  return {}


RWKV = Family(
  architecture='RwkvForCausalLM',
  words=(
    Word('vocab_size', 'vocab_size'),
    Word('hidden_size', 'd_model'),
    Groups(),
    Word('num_hidden_layers', 'num_layers'),
    Word('intermediate_size', 'ffn_dim', None, {None: 0}),
    Choice(
      ('attention_hidden_size',),
      _same_width,
      lambda ours: {'attention_hidden_size': ours.get('d_model')},
    ),
    Only('layer_norm_epsilon', 1e-5),  # of the last norm, whatever is said
    Word('tie_word_embeddings', 'tie_embeddings', False),
  ),
  ours={
    'pattern': ('rwkv4',),
    'embedding.scale': 1.0,
    'embedding.norm': True,
    'ffn': 'channel_mix',
    'activation': 'relu2',
    'norm': 'layernorm',
    'norms.eps': 1e-5,
  },
  ends=(
    row('embed.table', 'rwkv.embeddings.weight', 'v d -> v d'),
    *norm('embed_norm', 'rwkv.blocks.0.pre_ln'),
    *norm('norm', 'rwkv.ln_out'),
    row('unembed.table', 'head.weight', 'v d -> v d'),
  ),
  block='rwkv.blocks.{i}.',
  blocks=(
    *norm('mixer_norm', 'ln1'),
    row('mixer.rate', 'attention.time_decay', '(n h) -> n h'),
    row('mixer.bonus', 'attention.time_first', '(n h) -> n h'),
    row('mixer.mix_key', 'attention.time_mix_key', '1 1 d -> d'),
    row('mixer.mix_value', 'attention.time_mix_value', '1 1 d -> d'),
    row('mixer.mix_receptance', 'attention.time_mix_receptance', '1 1 d -> d'),
    *linear('mixer.key', 'attention.key', 'd', 'n h'),
    *linear('mixer.value', 'attention.value', 'd', 'n h'),
    *linear('mixer.receptance', 'attention.receptance', 'd', 'n h'),
    *linear('mixer.out', 'attention.output', 'n h', 'd'),
    *norm('ffn_norm', 'ln2'),
    row('ffn.mix_key', 'feed_forward.time_mix_key', '1 1 d -> d'),
    row('ffn.mix_receptance', 'feed_forward.time_mix_receptance', '1 1 d -> d'),
    *linear('ffn.up', 'feed_forward.key', 'd', 'f'),
    *linear('ffn.receptance', 'feed_forward.receptance', 'd', 'g'),
    *linear('ffn.down', 'feed_forward.value', 'f', 'd'),
  ),
  prefix='rwkv.',
  ignored=('context_length', 'rescale_every'),
)
