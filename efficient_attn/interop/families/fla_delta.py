"""Delta rules of flash-linear-attention (fla 0.6)."""

from efficient_attn.interop.families.fla import CONVS, GATED, family
from efficient_attn.interop.fla_words import (
  conv,
  decay_bound,
  expansions,
  head_dims,
  key_value_heads,
  value_heads,
)
from efficient_attn.interop.table import Row, linear, row
from efficient_attn.interop.words import Only, Word

DELTA = (
  *CONVS,
  *linear('mixer.beta', 'attn.b_proj', 'd', 'n'),
  *GATED,
  row('mixer.out.norm.scale', 'attn.o_norm.weight|attn.norm.weight'),
)
DECAY = (
  *linear('mixer.gate.project', 'attn.a_proj', 'd', 'n'),
  row('mixer.gate.dt_bias', 'attn.dt_bias'),
  row('mixer.gate.a_log', 'attn.A_log'),
)
NEGATIVE = 'allow_neg_eigval'

DELTA_NET = family(
  'DeltaNetForCausalLM',
  'deltanet',
  (
    Word('num_heads', 'mixers.deltanet.num_heads', 16),
    expansions('deltanet', heads=16),
    conv('deltanet', used=True),
    Word(NEGATIVE, 'mixers.deltanet.negative_eigenvalues', False),
    Only('use_gate', False),
    Only('use_beta', True),
    Only('use_output_norm', True),
    Only('qk_norm', 'l2'),
    Only('qk_activation', 'silu'),
  ),
  DELTA,
)

GATED_DELTANET = family(
  'GatedDeltaNetForCausalLM',
  'gated_deltanet',
  (
    value_heads('gated_deltanet', 6),
    head_dims('gated_deltanet', 256, 2.0),
    conv('gated_deltanet', used=True),
    Word(NEGATIVE, 'mixers.gated_deltanet.negative_eigenvalues', False),
    Only('use_gate', True),
    Only('output_gate_activation', 'swish'),
  ),
  (*DELTA, *DECAY),
  skip=('*.attn.D',),
)

COMBA = family(
  'CombaForCausalLM',
  'comba',
  (
    Word('num_heads', 'mixers.comba.num_heads', 6),
    key_value_heads('comba', 'num_v_heads'),
    head_dims('comba', 256, 2.0),
    conv('comba', used=True),
    Only('use_output_gate', True),
    Only('use_output_correction', True),
    Only('use_inner_decay', True),
  ),
  (
    *DELTA,
    *DECAY,
    row('mixer.erase', 'attn.decay'),
    row('mixer.correction', 'attn.D'),
  ),
  ignored=('correction_factor',),
)
KDA = family(
  'KDAForCausalLM',
  'kda',
  (
    value_heads('kda', 16),
    head_dims('kda', 128, 1.0),
    conv('kda', used=True),
    Word(NEGATIVE, 'mixers.kda.negative_eigenvalues', False),
    decay_bound('kda'),
  ),
  (
    *CONVS,
    *linear('mixer.beta', 'attn.b_proj', 'd', 'n'),
    *linear('mixer.gate.project.down', 'attn.f_proj.0', 'd', 'r'),
    *linear('mixer.gate.project.up', 'attn.f_proj.1', 'r', 'n h'),
    row('mixer.gate.dt_bias', 'attn.dt_bias', '(n h) -> n h'),
    row('mixer.gate.a_log', 'attn.A_log'),
    *linear('mixer.out.gate.down', 'attn.g_proj.0', 'd', 'r'),
    *linear('mixer.out.gate.up', 'attn.g_proj.1', 'r', 'n h'),
    *linear('mixer.out.out', 'attn.o_proj', 'n h', 'd'),
    row('mixer.out.norm.scale', 'attn.o_norm.weight'),
  ),
  ours={'mixers.kda.gate_bias': True},
)


def steps(part: str, place: int) -> tuple[Row, ...]:
  """Returns the rows of the keys or values of {s} steps, which come first."""
  theirs, ours = f'attn.{part[0]}', 'deltaproduct.qkv'
  return (
    row(
      f'{ours}.{part}.weight',
      f'{theirs}_proj.weight',
      '({s} n h) d -> d n ({s} h)',
    ),
    row(
      f'{ours}.convs.{place}.weight',
      f'{theirs}_conv1d.weight',
      '({s} n h) c w -> w n ({s} h)',
    ),
  )


def _steps(config):
  count = config.mixers.get('deltaproduct', {}).get('num_steps', 2)
  return {'s': (count,) * config.num_layers}


GATED_DELTAPRODUCT = family(
  'GatedDeltaProductForCausalLM',
  'deltaproduct',
  (
    Word('num_heads', 'mixers.deltaproduct.num_heads', 6),
    Word('num_householder', 'mixers.deltaproduct.num_steps', 1),
    head_dims('deltaproduct', 256, 2.0),
    conv('deltaproduct', used=True),
    Word(NEGATIVE, 'mixers.deltaproduct.negative_eigenvalues', False),
    Word('use_forget_gate', 'mixers.deltaproduct.forget_gate', False),
    Only('use_output_gate', True),
  ),
  (
    *DELTA,
    *DECAY,
    *steps('key', 1),
    *steps('value', 2),
    row(
      'deltaproduct.beta.weight', 'attn.b_proj.weight', '({s} n) d -> d n {s}'
    ),
  ),
  indices=_steps,
)
