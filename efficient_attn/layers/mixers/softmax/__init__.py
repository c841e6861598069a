"""Mixers that normalise with a softmax."""

from efficient_attn.layers.mixers.composed import Composed
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.fox import FoX
from efficient_attn.layers.mixers.softmax.path import PaTH
from efficient_attn.layers.mixers.softmax.weights import Softmax
from efficient_attn.layers.mixers.softmax.window import WindowRule
from efficient_attn.layers.mixers.spec import MixerSpec

SOFTMAX_WEIGHTS = dict(weights=Softmax)

SOFTMAX = {
  'attention': MixerSpec(
    Composed(Attention, SOFTMAX_WEIGHTS),
    'Softmax attention (MHA, GQA, MQA)',
    2017,
    '1706.03762',
    family='hardware-efficient',
    forms=('reference', 'blockwise'),
    time=2,
    state=1,
  ),
  'window': MixerSpec(
    Composed(Attention, SOFTMAX_WEIGHTS | dict(mask_rule=WindowRule)),
    'Sliding-window attention',
    2020,
    '2004.05150',
    family='sparse',
    forms=('reference', 'blockwise'),
  ),
  'fox': MixerSpec(
    FoX,
    'Forgetting Transformer (FoX)',
    2025,
    '2503.02130',
    family='dense',
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
    family='dense',
    forms=('recurrent', 'parallel', 'blockwise'),
    bidirectional=False,
    time=2,
    state=1,
  ),
}
