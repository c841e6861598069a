"""Softmax mixers with a fixed pattern of sparsity."""

from efficient_attn.layers.mixers.composed import Composed
from efficient_attn.layers.mixers.patterns.adaptive_span import AdaptiveSpan
from efficient_attn.layers.mixers.patterns.bigbird import BigBird
from efficient_attn.layers.mixers.patterns.blockbert import (
  BlockBERT,
  ShiftedBlocks,
)
from efficient_attn.layers.mixers.patterns.cascade import Cascade
from efficient_attn.layers.mixers.patterns.dam import DAM
from efficient_attn.layers.mixers.patterns.duo import DuoAttention, Streaming
from efficient_attn.layers.mixers.patterns.grid import GridAttention
from efficient_attn.layers.mixers.patterns.logsparse import LogSparse
from efficient_attn.layers.mixers.patterns.longformer import (
  LocalGlobal,
  Longformer,
)
from efficient_attn.layers.mixers.patterns.moa import MoA
from efficient_attn.layers.mixers.patterns.neighborhood import Neighborhood
from efficient_attn.layers.mixers.patterns.radial import Radial
from efficient_attn.layers.mixers.patterns.sliding_tile import SlidingTile
from efficient_attn.layers.mixers.patterns.sparse_transformer import (
  Factorized,
  SparseTransformer,
)
from efficient_attn.layers.mixers.patterns.star import Star
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.weights import Entmax, Softmax
from efficient_attn.layers.mixers.spec import MixerSpec

FORMS = ('reference', 'blockwise')
NO_POSITION = dict(position='none')


def sparse(mask_rule, mixer=Attention, **told) -> Composed:
  """Softmax attention with a rule of who sees whom."""
  return Composed(mixer, dict(mask_rule=mask_rule, weights=Softmax), **told)


def on_grid(mask_rule) -> Composed:
  """Softmax attention over a grid, whose positions the model adds."""
  return sparse(mask_rule, GridAttention, defaults=NO_POSITION)


PATTERNS = {
  'sparse_transformer': MixerSpec(
    sparse(Factorized, SparseTransformer),
    'Sparse Transformer',
    2019,
    '1904.10509',
    family='sparse',
    forms=FORMS,
    time=1.7,
    state=1,
  ),
  'logsparse': MixerSpec(
    sparse(LogSparse),
    'LogSparse Transformer',
    2019,
    '1907.00235',
    family='sparse',
    time=1.2,
    forms=FORMS,
    state=1,
  ),
  'star': MixerSpec(
    sparse(Star),
    'Star-Transformer',
    2019,
    '1902.09113',
    family='sparse',
    forms=FORMS,
    state=1,
  ),
  'blockbert': MixerSpec(
    sparse(ShiftedBlocks, BlockBERT, defaults=NO_POSITION, without=('sinks',)),
    'BlockBERT',
    2019,
    '1911.02972',
    family='sparse',
    forms=FORMS,
    causal=False,
    packing=False,
    time=2,
  ),
  'cascade': MixerSpec(
    sparse(Cascade),
    'Cascade Transformer',
    2020,
    '2002.06170',
    family='sparse',
    forms=FORMS,
    state=1,
  ),
  'longformer': MixerSpec(
    sparse(LocalGlobal, Longformer),
    'Longformer',
    2020,
    '2004.05150',
    family='sparse',
    forms=FORMS,
    state=1,
  ),
  'bigbird': MixerSpec(
    sparse(BigBird),
    'BigBird',
    2020,
    '2007.14062',
    family='sparse',
    forms=FORMS,
    state=1,
  ),
  'neighborhood': MixerSpec(
    on_grid(Neighborhood),
    'Neighborhood attention (NAT)',
    2022,
    '2204.07143',
    family='sparse',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'adaptive_span': MixerSpec(
    sparse(AdaptiveSpan),
    'Adaptive attention span',
    2019,
    '1905.07799',
    family='sparse',
    forms=FORMS,
  ),
  'entmax': MixerSpec(
    Composed(Attention, dict(weights=Entmax)),
    'Adaptively sparse attention (entmax)',
    2019,
    '1909.00015',
    family='sparse',
    forms=('reference',),
    time=2,
    state=1,
  ),
  'dam': MixerSpec(
    Composed(DAM, dict(weights=Softmax)),
    'SparseBERT (DAM)',
    2021,
    '2102.12871',
    family='sparse',
    forms=FORMS,
    time=2,
    state=1,
  ),
  'duo': MixerSpec(
    sparse(Streaming, DuoAttention, without=('sinks', 'shared_kv')),
    'DuoAttention',
    2024,
    '2410.10819',
    family='sparse',
    forms=FORMS,
    bidirectional=False,
    time=2,
    state=1,
  ),
  'moa': MixerSpec(
    sparse(MoA),
    'MoA (mixture of attention)',
    2024,
    '2406.14909',
    family='sparse',
    forms=FORMS,
    bidirectional=False,
    time=2,
    state=1,
  ),
  'sliding_tile': MixerSpec(
    on_grid(SlidingTile),
    'Sliding tile attention (STA)',
    2025,
    '2502.04507',
    family='sparse',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'radial': MixerSpec(
    on_grid(Radial),
    'Radial attention',
    2025,
    '2506.19852',
    family='sparse',
    time=1.3,
    forms=FORMS,
    causal=False,
    packing=False,
  ),
}
