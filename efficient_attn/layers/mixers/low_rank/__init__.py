"""Attention through a few latents, landmarks or summaries."""

from efficient_attn.layers.mixers.low_rank.funnel import Funnel
from efficient_attn.layers.mixers.low_rank.lambda_network import LambdaNetwork
from efficient_attn.layers.mixers.low_rank.latents import (
  Perceiver,
  SetTransformer,
)
from efficient_attn.layers.mixers.low_rank.linformer import Linformer
from efficient_attn.layers.mixers.low_rank.nystrom import Nystrom
from efficient_attn.layers.mixers.spec import MixerSpec

FORMS = ('reference', 'blockwise')


LOW_RANK = {
  'linformer': MixerSpec(
    Linformer,
    'Linformer',
    2020,
    '2006.04768',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'nystrom': MixerSpec(
    Nystrom,
    'Nyströmformer',
    2021,
    '2102.03902',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'perceiver': MixerSpec(
    Perceiver,
    'Perceiver',
    2021,
    '2103.03206',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'set_transformer': MixerSpec(
    SetTransformer,
    'Set Transformer (ISAB)',
    2018,
    '1810.00825',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'funnel': MixerSpec(
    Funnel,
    'Funnel-Transformer',
    2020,
    '2006.03236',
    forms=FORMS,
    causal=False,
    packing=False,
    time=2,
  ),
  'lambda_network': MixerSpec(
    LambdaNetwork,
    'LambdaNetworks',
    2021,
    '2102.08602',
    forms=('reference',),
    causal=False,
    packing=False,
  ),
}
