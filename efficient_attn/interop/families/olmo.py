"""OLMo 2 (2501.00656) and OLMo 3 (2025): norms of branches, and joint ones."""

import dataclasses

from efficient_attn.interop.families.llama import (
  ATTENTION,
  COMMON,
  FFN,
  LLAMA,
)
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import norm, row
from efficient_attn.interop.words import (
  FULL,
  KINDS,
  SLIDING,
  Word,
  cycle,
  layer_types,
)

WORDS = (
  *COMMON,
  Word('rms_norm_eps', ('norms.eps', 'mixers.*.qk_norms.eps'), 1e-5),
  Word('attention_bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias'), False),
)

OLMO2 = dataclasses.replace(
  LLAMA,
  architecture='Olmo2ForCausalLM',
  words=(*WORDS, Rope()),
  ours=LLAMA.ours
  | {
    'norm_position': 'branch',
    'mixers.*.qk_norm': True,
    'mixers.*.qk_norms.joint': True,
  },
  blocks=(
    *norm('mixer_norm', 'post_attention_layernorm'),
    *norm('ffn_norm', 'post_feedforward_layernorm'),
    *ATTENTION,
    row('mixer.query_norm.scale', 'self_attn.q_norm.weight', '(n h) -> n h'),
    row('mixer.key_norm.scale', 'self_attn.k_norm.weight', '(n h) -> n h'),
    *FFN,
  ),
)

OLMO3 = dataclasses.replace(
  OLMO2,
  architecture='Olmo3ForCausalLM',
  words=(
    *WORDS,
    layer_types(cycle(SLIDING, SLIDING, SLIDING, FULL)),
    Word('sliding_window', 'mixers.window.window', 4096),
    Rope(base={FULL: 5e5, SLIDING: 5e5}, kinds=KINDS, scaled=(FULL,)),
  ),
  ours={k: x for k, x in OLMO2.ours.items() if k != 'pattern'},
)
