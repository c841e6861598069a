"""gpt-oss (2508.10925): windows, sinks, and experts that are clamped GLUs."""

import dataclasses

from efficient_attn.interop.families.experts import BIASES, CHOICE
from efficient_attn.interop.families.llama import (
  ATTENTION,
  COMMON,
  LLAMA,
  NORMS,
)
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, row
from efficient_attn.interop.words import (
  FULL,
  SLIDING,
  Only,
  Word,
  cycle,
  layer_types,
)

GPT_OSS = dataclasses.replace(
  LLAMA,
  architecture='GptOssForCausalLM',
  words=(
    *(w for w in COMMON if w.name != 'hidden_act'),
    Only('hidden_act', 'silu'),
    Word('head_dim', 'mixers.*.head_dim', 64, {None: 0}),
    Word('rms_norm_eps', 'norms.eps', 1e-5),
    layer_types(cycle(SLIDING, FULL)),
    Word('sliding_window', 'mixers.window.window', 128),
    dataclasses.replace(BIASES, default=True),
    Word('num_local_experts', 'ffns.moe.num_experts', 128),
    *CHOICE,
    Only('swiglu_alpha', 1.702),
    Word('swiglu_limit', 'ffns.moe.limit', 7.0),
    Rope(base=150_000.0),
  ),
  ours=LLAMA.ours
  | {
    'ffn': 'moe',
    'activation': 'quick_gelu',
    'ffns.moe.offset': 1.0,
    'ffns.moe.bias': True,
    'ffns.moe.router.bias': True,
    'mixers.*.sinks': True,
  },
  blocks=(
    *NORMS,
    *ATTENTION,
    row('mixer.weights.sinks', 'self_attn.sinks', 'n -> n'),
    *linear('moe.router', 'mlp.router', 'd', 'e'),
    row(
      ('moe.gate.weight', 'moe.up.weight'),
      'mlp.experts.gate_up_proj',
      'e d (f [x]) -> e d f',
    ),
    row(
      ('moe.gate.bias', 'moe.up.bias'),
      'mlp.experts.gate_up_proj_bias',
      'e (f [x]) -> e f',
    ),
    row('moe.down.weight', 'mlp.experts.down_proj', 'e f d -> e f d'),
    row('moe.down.bias', 'mlp.experts.down_proj_bias', 'e d -> e d'),
  ),
  ignored=('initial_context_length', 'experts_per_token'),
)
