"""Mixers of low rank, over few latents, and without attention."""

from efficient_attn.layers.mixers.composed import Composed
from efficient_attn.layers.mixers.low_rank.base_conv import BaseConv
from efficient_attn.layers.mixers.low_rank.compressive import Compressive
from efficient_attn.layers.mixers.low_rank.fnet import FNet
from efficient_attn.layers.mixers.low_rank.funnel import Funnel
from efficient_attn.layers.mixers.low_rank.lambda_network import LambdaNetwork
from efficient_attn.layers.mixers.low_rank.latents import (
  Perceiver,
  SetTransformer,
)
from efficient_attn.layers.mixers.low_rank.linformer import Linformer
from efficient_attn.layers.mixers.low_rank.nystrom import Nystrom
from efficient_attn.layers.mixers.low_rank.synthesizer import Synthesizer
from efficient_attn.layers.mixers.low_rank.transformer_xl import TransformerXL
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.weights import Additive, Luong
from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec

# Dense matrices of logits, or tiles of them.
FORMS = ('reference', 'blockwise')

LOW_RANK = {
  'linformer': MixerSpec(
    Linformer,
    'Linformer',
    2020,
    '2006.04768',
    family='low-rank',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'nystrom': MixerSpec(
    Nystrom,
    'Nyströmformer',
    2021,
    '2102.03902',
    family='low-rank',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'fnet': MixerSpec(
    FNet,
    'FNet',
    2021,
    '2105.03824',
    family='low-rank',
    forms=('fft',),
    causal=False,
    packing=False,
  ),
  'transformer_xl': MixerSpec(
    TransformerXL,
    'Transformer-XL',
    2019,
    '1901.02860',
    family='low-rank',
    forms=('reference',),
  ),
  'compressive': MixerSpec(
    Compressive,
    'Compressive Transformer',
    2019,
    '1911.05507',
    family='low-rank',
    forms=('reference',),
    bidirectional=False,
    packing=False,
  ),
  'perceiver': MixerSpec(
    Perceiver,
    'Perceiver',
    2021,
    '2103.03206',
    family='low-rank',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'set_transformer': MixerSpec(
    SetTransformer,
    'Set Transformer (ISAB)',
    2018,
    '1810.00825',
    family='low-rank',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'synthesizer': MixerSpec(
    Synthesizer,
    'Synthesizer',
    2020,
    '2005.00743',
    family='low-rank',
    forms=('reference',),
    packing=False,
    time=2,
    state=1,
  ),
  'funnel': MixerSpec(
    Funnel,
    'Funnel-Transformer',
    2020,
    '2006.03236',
    family='low-rank',
    forms=FORMS,
    causal=False,
    packing=False,
    time=2,
  ),
  'lambda': MixerSpec(
    LambdaNetwork,
    'LambdaNetworks',
    2021,
    '2102.08602',
    family='low-rank',
    forms=('reference',),
    causal=False,
    packing=False,
  ),
  'base_conv': MixerSpec(
    BaseConv,
    'BaseConv (Zoology)',
    2023,
    '2312.04927',
    family='dense',
    forms=('convolution',),
    bidirectional=TWO_PASSES,
  ),
  'additive': MixerSpec(
    Composed(Attention, dict(weights=Additive), dict(position='none')),
    'Additive attention (Bahdanau)',
    2014,
    '1409.0473',
    family='dense',
    forms=('reference',),
    time=2,
    state=1,
  ),
  'luong': MixerSpec(
    Composed(Attention, dict(weights=Luong), dict(position='none')),
    'General attention (Luong)',
    2015,
    '1508.04025',
    family='dense',
    forms=('reference',),
    time=2,
    state=1,
  ),
}
