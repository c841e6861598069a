"""DeepSeek-V2 (2405.04434) and V3 (2412.19437).

Their attention is MLA; their ffns are dense, then mixtures of experts.
"""

import dataclasses

from efficient_attn.interop.families.experts import DENSE, EXPERTS
from efficient_attn.interop.families.llama import COMMON, LLAMA, NORMS
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.table import linear, row
from efficient_attn.interop.words import COUNT, Ffns, Only, Word, word

LATENT = (
  Word('num_key_value_heads', 'num_heads', None),
  *(w for w in COMMON if w.name not in ('num_key_value_heads', 'head_dim')),
  Word('q_lora_rank', 'mixers.mla.q_rank', None, {None: 0}),
  Word('kv_lora_rank', 'mixers.mla.kv_rank'),
  Word('qk_nope_head_dim', 'mixers.mla.nope_dim'),
  Word('qk_rope_head_dim', 'mixers.mla.rope_dim'),
  Word('v_head_dim', 'mixers.mla.value_dim'),
  Only('attention_bias', False),
)
MLA = (
  *linear('mixer.query_down', 'self_attn.q_a_proj', 'd', 'r'),
  row('mixer.query_norm.scale', 'self_attn.q_a_layernorm.weight'),
  *linear('mixer.query_up', 'self_attn.{queries}', 'd', 'n h'),
  *linear(
    ('mixer.kv_down', 'mixer.rotary_key'),
    'self_attn.kv_a_proj_with_mqa',
    'd',
    'r',
    rows='[r]',
  ),
  row('mixer.kv_norm.scale', 'self_attn.kv_a_layernorm.weight'),
  *linear(
    ('mixer.key_up', 'mixer.value_up'),
    'self_attn.kv_b_proj',
    'r',
    'n h',
    rows='n [h]',
  ),
  *linear('mixer.out', 'self_attn.o_proj', 'n h', 'd'),
)
SHARED = tuple(
  x
  for part, axes in (('gate', 'd f'), ('up', 'd f'), ('down', 'f d'))
  for x in linear(
    f'moe.shared.{part}', f'mlp.shared_experts.{part}_proj', *axes.split()
  )
)
IGNORED = ('head_dim', 'qk_head_dim')


def queries(config):
  """Queries that are not compressed have one matrix."""
  rank = config.mixers.get('mla', {}).get('q_rank')
  return {
    'queries': ('q_proj' if rank == 0 else 'q_b_proj',) * config.num_layers
  }


def _first_dense(words):
  first = words.get('first_k_dense_replace', 0)
  return ['glu' if i < first else 'moe' for i in range(words[COUNT])]


def _count_dense(ffns):
  return {'first_k_dense_replace': sum(ffn != 'moe' for ffn in ffns)}


@dataclasses.dataclass(frozen=True)
class Shared:
  """The width of the shared experts, in multiples of that of others."""

  default: int
  theirs: tuple[str, ...] = ('n_shared_experts', 'moe_intermediate_size')

  def read(self, words):
    """Returns both widths."""
    width = word(words, 'moe_intermediate_size')
    shared = word(words, 'n_shared_experts', self.default)
    return {'ffns.moe.ffn_dim': width, 'ffns.moe.shared_dim': shared * width}

  def write(self, ours):
    """Returns the width and how many."""
    width = ours.get('ffns.moe.ffn_dim')
    if width is None:
      return {}
    shared = ours.get('ffns.moe.shared_dim') // width
    return {'moe_intermediate_size': width, 'n_shared_experts': shared}


@dataclasses.dataclass(frozen=True)
class Groups:
  """The groups of DeepSeek-V2, which count for one of its methods alone."""

  theirs: tuple[str, ...] = ('topk_method', 'n_group', 'topk_group')

  def read(self, words):
    """Returns the groups."""
    Only('topk_method', self._method(words), 'greedy').read(words)
    limited = self._method(words) == 'group_limited_greedy'
    groups, best = (
      (words.get(name) or 1) if limited else 1 for name in self.theirs[1:]
    )
    return {
      'ffns.moe.router.groups': groups,
      'ffns.moe.router.top_groups': best,
    }

  def _method(self, words):
    limited = words.get('topk_method') == 'group_limited_greedy'
    return 'group_limited_greedy' if limited else 'greedy'

  def write(self, ours):
    """Returns the method and the groups."""
    groups = ours.get('ffns.moe.router.groups', 1)
    limited = 'group_limited_greedy' if groups > 1 else 'greedy'
    best = ours.get('ffns.moe.router.top_groups', 1)
    return {'topk_method': limited, 'n_group': groups, 'topk_group': best}


ROUTED = (
  Ffns(('first_k_dense_replace',), _first_dense, _count_dense),
  Word('n_routed_experts|num_local_experts', 'ffns.moe.num_experts'),
  Word('num_experts_per_tok', 'ffns.moe.top_k'),
)

DEEPSEEK_V2 = dataclasses.replace(
  LLAMA,
  architecture='DeepseekV2ForCausalLM',
  words=(
    *LATENT,
    *ROUTED,
    Shared(2),
    Groups(),
    Word('routed_scaling_factor', 'ffns.moe.router.scale', 1.0),
    Only('mlp_bias', False),
    Rope(),
  ),
  ours=LLAMA.ours
  | {
    'pattern': ('mla',),
    'mixers.mla.rotary.interleaved': True,
    'ffns.moe.router.normalize': False,
  },
  blocks=(*NORMS, *MLA, *DENSE, *EXPERTS, *SHARED),
  ignored=(
    *IGNORED,
    'aux_loss_alpha',
    'ep_size',
    'moe_layer_freq',
    'norm_topk_prob',
    'scoring_func',
    'seq_aux',
  ),
  indices=queries,
)

DEEPSEEK_V3 = dataclasses.replace(
  DEEPSEEK_V2,
  architecture='DeepseekV3ForCausalLM',
  words=(
    *LATENT,
    *ROUTED,
    Shared(1),
    Word('n_group', 'ffns.moe.router.groups', 8),
    Word('topk_group', 'ffns.moe.router.top_groups', 4),
    Word('norm_topk_prob', 'ffns.moe.router.normalize', True),
    Word('routed_scaling_factor', 'ffns.moe.router.scale', 2.5),
    Word('rope_interleave', 'mixers.mla.rotary.interleaved', True),
    Rope(),
  ),
  ours=LLAMA.ours
  | {
    'pattern': ('mla',),
    'ffns.moe.router.scores': 'sigmoid',
    'ffns.moe.router.correction': True,
    'ffns.moe.router.group_best': 2,
  },
  blocks=(
    *DEEPSEEK_V2.blocks,
    row('moe.router.correction', 'mlp.gate.e_score_correction_bias'),
  ),
  skip=(*LLAMA.skip, 'model.layers.61.*'),  # predicts one more token
  ignored=(*DEEPSEEK_V2.ignored, 'num_nextn_predict_layers', 'topk_method'),
)
