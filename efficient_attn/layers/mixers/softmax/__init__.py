"""Mixers that normalise with a softmax."""

from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.window import Window
from efficient_attn.layers.mixers.spec import MixerSpec

SOFTMAX = {
  'attention': MixerSpec(
    Attention,
    'Softmax attention (MHA, GQA, MQA)',
    2017,
    '1706.03762',
    family='hardware-efficient',
    forms=('reference', 'blockwise'),
    time=2,
    state=1,
  ),
  'window': MixerSpec(
    Window,
    'Sliding-window attention',
    2020,
    '2004.05150',
    family='sparse',
    forms=('reference', 'blockwise'),
  ),
}
