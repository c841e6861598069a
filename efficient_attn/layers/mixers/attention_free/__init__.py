"""Mixing without products of queries and keys."""

from efficient_attn.layers.mixers.attention_free.base_conv import BaseConv
from efficient_attn.layers.mixers.attention_free.fnet import FNet
from efficient_attn.layers.mixers.attention_free.gated_conv import GatedConv
from efficient_attn.layers.mixers.attention_free.synthesizer import Synthesizer
from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec

ATTENTION_FREE = {
  'synthesizer': MixerSpec(
    Synthesizer,
    'Synthesizer',
    2020,
    '2005.00743',
    forms=('reference',),
    packing=False,
    time=2,
    state=1,
  ),
  'fnet': MixerSpec(
    FNet,
    'FNet',
    2021,
    '2105.03824',
    forms=('fft',),
    causal=False,
    packing=False,
  ),
  'base_conv': MixerSpec(
    BaseConv,
    'BaseConv (Zoology)',
    2023,
    '2312.04927',
    forms=('convolution',),
    bidirectional=TWO_PASSES,
  ),
  'gated_conv': MixerSpec(
    GatedConv,
    'LFM2 (gated short convolution)',
    2025,
    '2511.23404',
    forms=('convolution',),
    bidirectional=TWO_PASSES,
  ),
}
