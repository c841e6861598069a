"""Mamba (2312.00752), Falcon-Mamba (2410.05355) and Mamba-2 (2405.21060)."""

import dataclasses
import math
from typing import Any

from efficient_attn.config import ConfigError
from efficient_attn.interop.family import Family
from efficient_attn.interop.table import linear, norm, row
from efficient_attn.interop.words import Only, Ours, Word, Words, word


@dataclasses.dataclass(frozen=True)
class Groups:
  """Heads where theirs has none: groups of channels, for devices to share."""

  theirs = ('hidden_size',)

  def read(self, words: Words) -> dict[str, Any]:
    """Returns 4 heads, or what divides the width."""
    return {'num_heads': math.gcd(word(words, 'hidden_size'), 4)}

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns nothing."""
    return {}


@dataclasses.dataclass(frozen=True)
class HeadDim:
  """A width of heads that follows from the other words."""

  theirs = ('head_dim',)

  def read(self, words: Words) -> dict[str, Any]:
    """Refuses other widths than that of `expand`."""
    inner = word(words, 'expand', 2) * word(words, 'hidden_size')
    heads, width = word(words, 'num_heads', 128), word(words, 'head_dim', 64)
    if heads * width != inner:
      raise ConfigError(
        f'head_dim={width!r}: expand times hidden_size are {inner}, not '
        f'{heads} heads of it'
      )
    return {}

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns the width of the heads."""
    inner = ours.get('mixers.*.expand', 0) * ours.get('d_model')
    return {'head_dim': inner // ours.get('num_heads')}


@dataclasses.dataclass(frozen=True)
class TimeSteps:
  """The limits of dt of our mixer under `ours`, [low, high] or infinity."""

  ours: str
  theirs = ('time_step_limit',)

  def read(self, words: Words) -> dict[str, Any]:
    """Returns both limits."""
    low, high = word(words, 'time_step_limit', (0.0, math.inf))
    if isinstance(high, dict):
      high = float(high['__float__'])
    high = None if high == math.inf else high
    return {f'{self.ours}.dt_min': low, f'{self.ours}.dt_max': high}

  def write(self, ours: Ours) -> dict[str, Any]:
    """Returns the pair."""
    high = ours.get(f'{self.ours}.dt_max')
    high = {'__float__': 'Infinity'} if high is None else high
    return {'time_step_limit': [ours.get(f'{self.ours}.dt_min'), high]}


COMMON = (
  Word('vocab_size', 'vocab_size'),
  Word('hidden_size', 'd_model'),
  Word('num_hidden_layers', 'num_layers'),
  Word('expand', 'mixers.*.expand', 2),
  Word('conv_kernel', 'mixers.*.conv_width', 4),
  Word('use_conv_bias', 'mixers.*.conv_bias', True),
  Word('use_bias', ('mixers.*.in_bias', 'mixers.*.out_bias'), False),
  Only('hidden_act', 'silu'),
)
IGNORED = (
  'intermediate_size', 'rescale_prenorm_residual', 'residual_in_fp32',
  'time_step_floor', 'time_step_init_scheme', 'time_step_max', 'time_step_min',
  'time_step_scale', 'use_associative_scan', 'use_mambapy',
)  # fmt: skip
ENDS = (
  row(
    'embed.table',
    'backbone.embeddings.weight|backbone.embedding.weight',
    'v d -> v d',
  ),
  row('norm.scale', 'backbone.norm_f.weight'),
  row('unembed.table', 'lm_head.weight', 'v d -> v d'),
)


def selective(ours: str, theirs: str) -> tuple:
  """Returns the rows of Mamba, our mixer and theirs."""
  return (
    *linear(
      (f'{ours}.value', f'{ours}.gate'),
      f'{theirs}.in_proj',
      'd',
      'n h',
      rows='[n] h',
    ),
    row(f'{ours}.conv.weight', f'{theirs}.conv1d.weight', '(n h) 1 w -> w n h'),
    row(f'{ours}.conv.bias', f'{theirs}.conv1d.bias', '(n h) -> n h'),
    row(f'{ours}.select.weight', f'{theirs}.x_proj.weight', 'r (n h) -> n h r'),
    row(f'{ours}.dt.weight', f'{theirs}.dt_proj.weight', '(n h) r -> r n h'),
    row(f'{ours}.dt_bias', f'{theirs}.dt_proj.bias', '(n h) -> n h'),
    row(f'{ours}.a_log', f'{theirs}.A_log', '(n h) s -> n h s'),
    row(f'{ours}.skip', f'{theirs}.D', '(n h) -> n h'),
    *linear(f'{ours}.out', f'{theirs}.out_proj', 'n h', 'd'),
  )


def dual(ours: str, theirs: str) -> tuple:
  """Returns the rows of Mamba-2, our mixer and theirs."""
  parts = ('gate', 'x', 'bc', 'dt')
  convs = (f'{ours}.x_conv', f'{ours}.bc_conv')
  return (
    *linear(
      tuple(f'{ours}.{part}' for part in parts),
      f'{theirs}.in_proj',
      'd',
      'n h, n h, n, n',
      rows='[n h]',
    ),
    row(
      tuple(f'{conv}.weight' for conv in convs),
      f'{theirs}.conv1d.weight',
      '[n h] 1 w -> w n h, w n',
    ),
    row(
      tuple(f'{conv}.bias' for conv in convs),
      f'{theirs}.conv1d.bias',
      '[n h] -> n h, n',
    ),
    row(f'{ours}.dt_bias', f'{theirs}.dt_bias'),
    row(f'{ours}.a_log', f'{theirs}.A_log'),
    row(f'{ours}.skip', f'{theirs}.D', '(n 1) -> n 1'),
    row(f'{ours}.norm.scale', f'{theirs}.norm.weight', '(n h) -> n h'),
    *linear(f'{ours}.out', f'{theirs}.out_proj', 'n h', 'd'),
  )


MAMBA = Family(
  architecture='MambaForCausalLM',
  words=(
    *COMMON,
    Groups(),
    Word('state_size', 'mixers.*.d_state', 16),
    Word('time_step_rank', 'mixers.*.dt_rank', 'auto', {'auto': 0}),
    Word('layer_norm_epsilon', 'norms.eps', 1e-5),
    Word('tie_word_embeddings', 'tie_embeddings', True),
  ),
  ours={
    'pattern': ('mamba',),
    'embedding.scale': 1.0,
    'ffn': 'none',
    'norm': 'rmsnorm',
  },
  ends=ENDS,
  block='backbone.layers.{i}.',
  blocks=(*norm('mixer_norm', 'norm'), *selective('mixer', 'mixer')),
  prefix='backbone.',
  ignored=IGNORED,
)

FALCON_MAMBA = dataclasses.replace(
  MAMBA,
  architecture='FalconMambaForCausalLM',
  words=(*MAMBA.words, Word('mixer_rms_eps', 'mixers.*.norm_eps', 1e-6)),
  ours=MAMBA.ours | {'mixers.*.select_norm': 'plain'},
)

MAMBA2 = dataclasses.replace(
  MAMBA,
  architecture='Mamba2ForCausalLM',
  words=(
    *COMMON,
    Word('num_heads', 'num_heads', 128),
    HeadDim(),
    Word('state_size', 'mixers.*.state_dim', 128),
    Word('n_groups', 'mixers.*.groups', 8),
    TimeSteps('mixers.*'),
    Word('layer_norm_epsilon', ('norms.eps', 'mixers.*.norm_eps'), 1e-5),
    Word('tie_word_embeddings', 'tie_embeddings', False),
  ),
  ours=MAMBA.ours | {'pattern': ('mamba2',)},
  blocks=(*norm('mixer_norm', 'norm'), *dual('mixer', 'mixer')),
  ignored=(*IGNORED, 'chunk_size', 'time_step_rank'),
)
