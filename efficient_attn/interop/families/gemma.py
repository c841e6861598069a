"""Gemma 2 (2408.00118) and the text model of Gemma 3 (2503.19786)."""

import dataclasses

from efficient_attn.interop.families.llama import (
  ACTIVATIONS,
  ATTENTION,
  FFN,
  LLAMA,
  SIZES,
)
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import norm, row
from efficient_attn.interop.words import (
  FULL,
  KINDS,
  SLIDING,
  Only,
  Word,
  cycle,
  integer,
  layer_types,
)


def _scalar(scale):
  """Returns the number whose -1/2nd power is a scale."""
  found = round(scale**-2, 6)
  return int(found) if found.is_integer() else found


WORDS = (
  *SIZES,
  Word('head_dim', 'mixers.*.head_dim', 256),
  Word('rms_norm_eps', ('norms.eps', 'mixers.*.qk_norms.eps'), 1e-6),
  Word(
    'hidden_activation|hidden_act',
    'activation',
    'gelu_pytorch_tanh',
    ACTIVATIONS,
    strict=True,
  ),
  Word('tie_word_embeddings', 'tie_embeddings', True),
  Word('attention_bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias'), False),
  Word(
    'query_pre_attn_scalar',
    'mixers.*.scale',
    256,
    convert=lambda x: x**-0.5,
    revert=_scalar,
  ),
  Word('sliding_window', 'mixers.window.window', 4096),
)
NORMS = (
  *norm('mixer_norm', 'input_layernorm'),
  *norm('mixer_post_norm', 'post_attention_layernorm'),
  *norm('ffn_norm', 'pre_feedforward_layernorm'),
  *norm('ffn_post_norm', 'post_feedforward_layernorm'),
)

GEMMA2 = dataclasses.replace(
  LLAMA,
  architecture='Gemma2ForCausalLM',
  words=(
    *WORDS,
    Word('attn_logit_softcapping', 'mixers.*.logits_soft_cap', 50.0),
    Word('final_logit_softcapping', 'logits.soft_cap', 30.0),
    layer_types(cycle(SLIDING, FULL)),
    Only('use_bidirectional_attention', None),
    Rope(),
  ),
  ours={
    'ffn': 'glu',
    'norm': 'rmsnorm',
    'norms.zero_centered': True,
    'norm_position': 'sandwich',
  },
  blocks=(*NORMS, *ATTENTION, *FFN),
)


def _default(words):
  size = integer(words, 'sliding_window_pattern', 6)
  return cycle(*[SLIDING] * (size - 1), FULL)(words)


GEMMA3_TEXT = dataclasses.replace(
  GEMMA2,
  architecture='Gemma3ForCausalLM',
  words=(
    *WORDS,
    Word('attn_logit_softcapping', 'mixers.*.logits_soft_cap', None),
    Word('final_logit_softcapping', 'logits.soft_cap', None),
    layer_types(_default, others=('sliding_window_pattern',)),
    Only('use_bidirectional_attention', False),
    Rope(
      base={FULL: 1e6, SLIDING: 1e4},
      kinds=KINDS,
      local='rope_local_base_freq',
      scaled=(FULL,),
    ),
  ),
  ours=GEMMA2.ours
  | {'mixers.*.qk_norm': True, 'mixers.*.qk_norms.zero_centered': True},
  blocks=(
    *GEMMA2.blocks,
    row('mixer.query_norm.scale', 'self_attn.q_norm.weight'),
    row('mixer.key_norm.scale', 'self_attn.k_norm.weight'),
  ),
  ignored=('_sliding_window_pattern',),
)
