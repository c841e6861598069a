"""Dense softmax attention, and other weights of all pairs of tokens."""

from efficient_attn.layers.mixers.composed import Composed
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.compressive import Compressive
from efficient_attn.layers.mixers.softmax.differential import Differential
from efficient_attn.layers.mixers.softmax.fox import FoX
from efficient_attn.layers.mixers.softmax.path import PaTH
from efficient_attn.layers.mixers.softmax.transformer_xl import TransformerXL
from efficient_attn.layers.mixers.softmax.weights import (
  Additive,
  Entmax,
  Luong,
  Softmax,
)
from efficient_attn.layers.mixers.spec import MixerSpec

SOFTMAX_WEIGHTS = dict(weights=Softmax)
FORMS = ('reference', 'blockwise')


SOFTMAX = {
  'attention': MixerSpec(
    Composed(Attention, SOFTMAX_WEIGHTS),
    'Softmax attention (MHA, GQA, MQA)',
    2017,
    '1706.03762',
    forms=('reference', 'blockwise'),
    time=2,
    state=1,
  ),
  'additive': MixerSpec(
    Composed(Attention, dict(weights=Additive), dict(position='none')),
    'Additive attention (Bahdanau)',
    2014,
    '1409.0473',
    forms=('reference',),
    time=2,
    state=1,
  ),
  'luong': MixerSpec(
    Composed(Attention, dict(weights=Luong), dict(position='none')),
    'General attention (Luong)',
    2015,
    '1508.04025',
    forms=('reference',),
    time=2,
    state=1,
  ),
  'entmax': MixerSpec(
    Composed(Attention, dict(weights=Entmax)),
    'Adaptively sparse attention (entmax)',
    2019,
    '1909.00015',
    forms=('reference',),
    time=2,
    state=1,
  ),
  'differential': MixerSpec(
    Composed(Attention, dict(weights=Differential)),
    'Differential attention',
    2024,
    '2410.05258',
    forms=FORMS,
    time=2,
    state=1,
  ),
  'fox': MixerSpec(
    FoX,
    'Forgetting Transformer (FoX)',
    2025,
    '2503.02130',
    gate='scalar',
    forms=('reference', 'blockwise'),
    bidirectional=False,
    time=2,
    state=1,
  ),
  'path': MixerSpec(
    PaTH,
    'PaTH attention',
    2025,
    '2505.16381',
    forms=('recurrent', 'parallel', 'blockwise'),
    bidirectional=False,
    time=2,
    state=1,
  ),
  'transformer_xl': MixerSpec(
    TransformerXL,
    'Transformer-XL',
    2019,
    '1901.02860',
    forms=('reference',),
  ),
  'compressive': MixerSpec(
    Compressive,
    'Compressive Transformer',
    2019,
    '1911.05507',
    forms=('reference',),
    bidirectional=False,
    packing=False,
  ),
}
