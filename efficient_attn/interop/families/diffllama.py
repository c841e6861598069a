"""DiffLlama: Llama with differential attention (2410.05258).

Its lambda starts from another number in each layer, so that each layer has
options of its own, and none are scanned. The heads of the two maps are halves
of all heads in its files, and halves of each head here.
"""

import dataclasses
import math

from efficient_attn.interop.families.llama import (
  COMMON,
  ENDS,
  FFN,
  LLAMA,
  NORMS,
)
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, row
from efficient_attn.interop.words import Choice, Layers, Word, count_of


def _names(words):
  return [f'differential:{i}' for i in range(count_of(words))]


def _starts(words):
  return {
    f'mixers.{name}.lambda_init': 0.8 - 0.6 * math.exp(-0.3 * i)
    for i, name in enumerate(_names(words))
  }


HALF = dict(convert=lambda x: x // 2, revert=lambda x: 2 * x)
DOUBLE = dict(convert=lambda x: 2 * x, revert=lambda x: x // 2)

DIFFLLAMA = dataclasses.replace(
  LLAMA,
  architecture='DiffLlamaForCausalLM',
  words=(
    *COMMON,
    Word('num_attention_heads', 'num_heads', **HALF),
    Word(
      'num_key_value_heads', 'mixers.*.num_kv_heads', None, {None: 0}, **HALF
    ),
    Word('head_dim', 'mixers.*.head_dim', None, {None: 0}, **DOUBLE),
    Word('rms_norm_eps', ('norms.eps', 'mixers.*.norm_eps'), 1e-5),
    Word('attention_bias', ('mixers.*.qkv_bias', 'mixers.*.out_bias'), False),
    Layers((), _names, lambda _: {}),
    Choice((), _starts, lambda _: {}),
    Rope(),
  ),
  ours={k: x for k, x in LLAMA.ours.items() if k != 'pattern'}
  | {'mixers.*.norm_scale': False},
  ends=ENDS,
  blocks=(
    *NORMS,
    *linear(
      'mixer.qkv.query', 'self_attn.q_proj', 'd', 'n (2 h)', rows='2 n h'
    ),
    *linear('mixer.qkv.key', 'self_attn.k_proj', 'd', 'n (2 h)', rows='2 n h'),
    *linear(
      'mixer.qkv.value', 'self_attn.v_proj', 'd', 'n (2 h)', rows='2 n h'
    ),
    *linear('mixer.out', 'self_attn.o_proj', 'n h', 'd'),
    row('mixer.weights.lambda_q1', 'self_attn.lambda_q1'),
    row('mixer.weights.lambda_k1', 'self_attn.lambda_k1'),
    row('mixer.weights.lambda_q2', 'self_attn.lambda_q2'),
    row('mixer.weights.lambda_k2', 'self_attn.lambda_k2'),
    *FFN,
  ),
  ignored=('lambda_std_dev',),
)
