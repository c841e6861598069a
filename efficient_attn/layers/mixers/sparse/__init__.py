"""Softmax attention with a fixed rule of who sees whom."""

from efficient_attn.layers.mixers.composed import Composed
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.weights import Softmax
from efficient_attn.layers.mixers.sparse.adaptive_span import AdaptiveSpan
from efficient_attn.layers.mixers.sparse.bigbird import BigBird
from efficient_attn.layers.mixers.sparse.blockbert import (
  BlockBERT,
  ShiftedBlocks,
)
from efficient_attn.layers.mixers.sparse.cascade import Cascade
from efficient_attn.layers.mixers.sparse.dam import DAM
from efficient_attn.layers.mixers.sparse.duo import DuoAttention, Streaming
from efficient_attn.layers.mixers.sparse.grid import GridAttention
from efficient_attn.layers.mixers.sparse.logsparse import LogSparse
from efficient_attn.layers.mixers.sparse.longformer import (
  LocalGlobal,
  Longformer,
)
from efficient_attn.layers.mixers.sparse.moa import MoA
from efficient_attn.layers.mixers.sparse.neighborhood import Neighborhood
from efficient_attn.layers.mixers.sparse.radial import Radial
from efficient_attn.layers.mixers.sparse.sliding_tile import SlidingTile
from efficient_attn.layers.mixers.sparse.sparse_transformer import (
  Factorized,
  SparseTransformer,
)
from efficient_attn.layers.mixers.sparse.star import Star
from efficient_attn.layers.mixers.sparse.window import WindowRule
from efficient_attn.layers.mixers.spec import MixerSpec

FORMS = ('reference', 'blockwise')
NO_POSITION = dict(position='none')
SOFTMAX_WEIGHTS = dict(weights=Softmax)


def sparse(mask_rule, mixer=Attention, **told) -> Composed:
  """Softmax attention with a rule of who sees whom."""
  return Composed(mixer, dict(mask_rule=mask_rule, weights=Softmax), **told)


def on_grid(mask_rule) -> Composed:
  """Softmax attention over a grid, whose positions the model adds."""
  return sparse(mask_rule, GridAttention, defaults=NO_POSITION)


SPARSE = {
  'window': MixerSpec(
    Composed(Attention, SOFTMAX_WEIGHTS | dict(mask_rule=WindowRule)),
    'Sliding-window attention',
    2020,
    '2004.05150',
    forms=('reference', 'blockwise'),
  ),
  'sparse_transformer': MixerSpec(
    sparse(Factorized, SparseTransformer),
    'Sparse Transformer',
    2019,
    '1904.10509',
    forms=FORMS,
    time=1.7,
    state=1,
  ),
  'logsparse': MixerSpec(
    sparse(LogSparse),
    'LogSparse Transformer',
    2019,
    '1907.00235',
    time=1.2,
    forms=FORMS,
    state=1,
  ),
  'star': MixerSpec(
    sparse(Star),
    'Star-Transformer',
    2019,
    '1902.09113',
    forms=FORMS,
    state=1,
  ),
  'blockbert': MixerSpec(
    sparse(ShiftedBlocks, BlockBERT, defaults=NO_POSITION, without=('sinks',)),
    'BlockBERT',
    2019,
    '1911.02972',
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
    forms=FORMS,
    state=1,
  ),
  'longformer': MixerSpec(
    sparse(LocalGlobal, Longformer),
    'Longformer',
    2020,
    '2004.05150',
    forms=FORMS,
    state=1,
  ),
  'bigbird': MixerSpec(
    sparse(BigBird),
    'BigBird',
    2020,
    '2007.14062',
    forms=FORMS,
    state=1,
  ),
  'neighborhood': MixerSpec(
    on_grid(Neighborhood),
    'Neighborhood attention (NAT)',
    2022,
    '2204.07143',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'adaptive_span': MixerSpec(
    sparse(AdaptiveSpan),
    'Adaptive attention span',
    2019,
    '1905.07799',
    forms=FORMS,
  ),
  'dam': MixerSpec(
    Composed(DAM, dict(weights=Softmax)),
    'SparseBERT (DAM)',
    2021,
    '2102.12871',
    forms=FORMS,
    time=2,
    state=1,
  ),
  'duo': MixerSpec(
    sparse(Streaming, DuoAttention, without=('sinks', 'shared_kv')),
    'DuoAttention',
    2024,
    '2410.10819',
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
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'radial': MixerSpec(
    on_grid(Radial),
    'Radial attention',
    2025,
    '2506.19852',
    time=1.3,
    forms=FORMS,
    causal=False,
    packing=False,
  ),
}
