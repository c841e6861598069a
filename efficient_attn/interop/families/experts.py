"""Families of softmax attention with mixtures of experts.

Mixtral (2401.04088), Qwen3-MoE (2505.09388) and OLMoE (2409.02060).
"""

import dataclasses

from efficient_attn.interop.families.llama import (
  ATTENTION,
  COMMON,
  FFN,
  LLAMA,
  NORMS,
)
from efficient_attn.interop.families.qwen import QWEN3
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, row
from efficient_attn.interop.words import (
  COUNT,
  Ffns,
  Layers,
  Only,
  Word,
)

BIASES = Word(
  'attention_bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias'), False
)
CHOICE = (
  Word('num_experts_per_tok', 'ffns.moe.top_k'),
  Word('router_aux_loss_coef', 'ffns.moe.router.balance_weight', 0.001),
)
NORMALIZE = Word('norm_topk_prob', 'ffns.moe.router.normalize', False)


def experts(block: str, names: tuple[str, str, str]):
  """Returns the rows of experts that have tensors of their own."""
  gate, up, down = (f'{block}.experts.{{e}}.{name}' for name in names)
  return (
    *linear('moe.router', f'{block}.gate', 'd', 'e'),
    *linear('moe.gate', gate, 'd', 'f'),
    *linear('moe.up', up, 'd', 'f'),
    *linear('moe.down', down, 'f', 'd'),
  )


EXPERTS = experts('mlp', ('gate_proj', 'up_proj', 'down_proj'))
DENSE = tuple(
  dataclasses.replace(r, ours=tuple(x.replace('ffn.', 'glu.') for x in r.ours))
  for r in FFN
)


def _windows(words, window):
  """All layers have a window, or none has."""
  return ['window' if window else 'attention'] * words[COUNT]


MIXTRAL = dataclasses.replace(
  LLAMA,
  architecture='MixtralForCausalLM',
  words=(
    *COMMON,
    Layers(
      ('sliding_window',),
      lambda words: _windows(words, words.get('sliding_window')),
      lambda _: {},
    ),
    Word('sliding_window', 'mixers.window.window', None),
    Word('rms_norm_eps', 'norms.eps', 1e-5),
    Word('num_local_experts', 'ffns.moe.num_experts', 8),
    *CHOICE,
    Rope(base=1e6),
  ),
  ours=LLAMA.ours | {'ffn': 'moe'},
  blocks=(
    *NORMS,
    *ATTENTION,
    *experts('block_sparse_moe', ('w1', 'w3', 'w2')),
  ),
  ignored=('router_jitter_noise',),
)


def _sparse(words):
  """Layers are dense where listed, and but for every k-th."""
  dense = words.get('mlp_only_layers') or []
  step = words.get('decoder_sparse_step', 1)
  return [
    'moe' if (i + 1) % step == 0 and i not in dense else 'glu'
    for i in range(words[COUNT])
  ]


def _dense(ffns):
  dense = [i for i, ffn in enumerate(ffns) if ffn != 'moe']
  return {'mlp_only_layers': dense, 'decoder_sparse_step': 1}


QWEN3_MOE = dataclasses.replace(
  QWEN3,
  architecture='Qwen3MoeForCausalLM',
  words=(
    *COMMON,
    Layers(
      ('use_sliding_window',),
      lambda words: _windows(
        words, words.get('use_sliding_window') and words.get('sliding_window')
      ),
      lambda layers: {'use_sliding_window': 'window' in layers},
    ),
    Word('sliding_window', 'mixers.window.window', None),
    Word('rms_norm_eps', ('norms.eps', 'mixers.*.qk_norms.eps'), 1e-6),
    Ffns(('mlp_only_layers', 'decoder_sparse_step'), _sparse, _dense),
    Word('moe_intermediate_size', 'ffns.moe.ffn_dim', 768),
    Word('num_local_experts|num_experts', 'ffns.moe.num_experts', 128),
    *CHOICE,
    NORMALIZE,
    BIASES,
    Rope(),
  ),
  blocks=(*QWEN3.blocks[: -len(FFN) - 2], *QWEN3.blocks[-2:], *DENSE, *EXPERTS),
  ignored=('max_window_layers',),
)

OLMOE = dataclasses.replace(
  LLAMA,
  architecture='OlmoeForCausalLM',
  words=(
    *COMMON,
    Word('rms_norm_eps', ('norms.eps', 'mixers.*.qk_norms.eps'), 1e-5),
    Word('num_experts', 'ffns.moe.num_experts', 64),
    *CHOICE,
    Word('router_aux_loss_coef', 'ffns.moe.router.balance_weight', 0.01),
    NORMALIZE,
    BIASES,
    Only('clip_qkv', None),
    Rope(),
  ),
  ours=LLAMA.ours
  | {'ffn': 'moe', 'mixers.*.qk_norm': True, 'mixers.*.qk_norms.joint': True},
  blocks=(
    *NORMS,
    *ATTENTION,
    row('mixer.query_norm.scale', 'self_attn.q_norm.weight', '(n h) -> n h'),
    row('mixer.key_norm.scale', 'self_attn.k_norm.weight', '(n h) -> n h'),
    *EXPERTS,
  ),
)
