"""Softmax mixers with a fixed pattern of sparsity."""

from efficient_attn.layers.mixers.patterns.adaptive_span import AdaptiveSpan
from efficient_attn.layers.mixers.patterns.bigbird import BigBird
from efficient_attn.layers.mixers.patterns.blockbert import BlockBERT
from efficient_attn.layers.mixers.patterns.cascade import Cascade
from efficient_attn.layers.mixers.patterns.dam import DAM
from efficient_attn.layers.mixers.patterns.duo import DuoAttention
from efficient_attn.layers.mixers.patterns.entmax import Entmax
from efficient_attn.layers.mixers.patterns.logsparse import LogSparse
from efficient_attn.layers.mixers.patterns.longformer import Longformer
from efficient_attn.layers.mixers.patterns.moa import MoA
from efficient_attn.layers.mixers.patterns.neighborhood import Neighborhood
from efficient_attn.layers.mixers.patterns.radial import Radial
from efficient_attn.layers.mixers.patterns.sliding_tile import SlidingTile
from efficient_attn.layers.mixers.patterns.sparse_transformer import (
  SparseTransformer,
)
from efficient_attn.layers.mixers.patterns.star import Star
from efficient_attn.layers.mixers.spec import MixerSpec

FORMS = ('reference', 'blockwise')

PATTERNS = {
  'sparse_transformer': MixerSpec(
    SparseTransformer,
    'Sparse Transformer',
    2019,
    '1904.10509',
    family='sparse',
    forms=FORMS,
    time=1.7,
    state=1,
  ),
  'logsparse': MixerSpec(
    LogSparse,
    'LogSparse Transformer',
    2019,
    '1907.00235',
    family='sparse',
    time=1.2,
    forms=FORMS,
    state=1,
  ),
  'star': MixerSpec(
    Star,
    'Star-Transformer',
    2019,
    '1902.09113',
    family='sparse',
    forms=FORMS,
    state=1,
  ),
  'blockbert': MixerSpec(
    BlockBERT,
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
    Cascade,
    'Cascade Transformer',
    2020,
    '2002.06170',
    family='sparse',
    forms=FORMS,
    state=1,
  ),
  'longformer': MixerSpec(
    Longformer,
    'Longformer',
    2020,
    '2004.05150',
    family='sparse',
    forms=FORMS,
    state=1,
  ),
  'bigbird': MixerSpec(
    BigBird,
    'BigBird',
    2020,
    '2007.14062',
    family='sparse',
    forms=FORMS,
    state=1,
  ),
  'neighborhood': MixerSpec(
    Neighborhood,
    'Neighborhood attention (NAT)',
    2022,
    '2204.07143',
    family='sparse',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'adaptive_span': MixerSpec(
    AdaptiveSpan,
    'Adaptive attention span',
    2019,
    '1905.07799',
    family='sparse',
    forms=FORMS,
  ),
  'entmax': MixerSpec(
    Entmax,
    'Adaptively sparse attention (entmax)',
    2019,
    '1909.00015',
    family='sparse',
    forms=('reference',),
    time=2,
    state=1,
  ),
  'dam': MixerSpec(
    DAM,
    'SparseBERT (DAM)',
    2021,
    '2102.12871',
    family='sparse',
    forms=FORMS,
    time=2,
    state=1,
  ),
  'duo': MixerSpec(
    DuoAttention,
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
    MoA,
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
    SlidingTile,
    'Sliding tile attention (STA)',
    2025,
    '2502.04507',
    family='sparse',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'radial': MixerSpec(
    Radial,
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
