"""Recurrences whose gates only forget."""

from efficient_attn.layers.mixers.gated.gla import GLA
from efficient_attn.layers.mixers.gated.gsa import GSA
from efficient_attn.layers.mixers.gated.hgrn import HGRN
from efficient_attn.layers.mixers.gated.hgrn2 import HGRN2
from efficient_attn.layers.mixers.gated.log_linear import LogLinear
from efficient_attn.layers.mixers.gated.metala import MetaLA
from efficient_attn.layers.mixers.gated.retention import Retention
from efficient_attn.layers.mixers.gated.rg_lru import RGLRU
from efficient_attn.layers.mixers.gated.rodimus import Rodimus
from efficient_attn.layers.mixers.gated.rwkv4 import RWKV4
from efficient_attn.layers.mixers.gated.rwkv5 import RWKV5
from efficient_attn.layers.mixers.gated.rwkv6 import RWKV6
from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec

GATED = {
  'retention': MixerSpec(
    Retention, 'RetNet', 2023, '2307.08621', gate='constant'
  ),
  'gla': MixerSpec(
    GLA, 'Gated Linear Attention', 2023, '2312.06635', gate='channel'
  ),
  'hgrn': MixerSpec(
    HGRN,
    'HGRN',
    2023,
    '2311.04823',
    gate='channel',
    forms=('recurrent', 'chunkwise'),
    bidirectional=TWO_PASSES,
  ),
  'rg_lru': MixerSpec(
    RGLRU,
    'Griffin (RG-LRU)',
    2024,
    '2402.19427',
    gate='channel',
    forms=('recurrent', 'chunkwise'),
    bidirectional=TWO_PASSES,
  ),
  'rwkv4': MixerSpec(
    RWKV4,
    'RWKV-4',
    2023,
    '2305.13048',
    gate='channel',
    forms=('recurrent', 'chunkwise'),
    bidirectional=TWO_PASSES,
  ),
  'rwkv5': MixerSpec(
    RWKV5,
    'RWKV-5 (Eagle)',
    2024,
    '2404.05892',
    gate='channel',
    bidirectional=TWO_PASSES,
  ),
  'rwkv6': MixerSpec(
    RWKV6,
    'RWKV-6 (Finch)',
    2024,
    '2404.05892',
    gate='channel',
    bidirectional=TWO_PASSES,
  ),
  'hgrn2': MixerSpec(HGRN2, 'HGRN2', 2024, '2404.07904', gate='channel'),
  'gsa': MixerSpec(
    GSA,
    'Gated Slot Attention',
    2024,
    '2409.07146',
    gate='channel',
    bidirectional=TWO_PASSES,
  ),
  'rodimus': MixerSpec(
    Rodimus,
    'Rodimus',
    2024,
    '2410.06577',
    gate='channel',
    bidirectional=TWO_PASSES,
  ),
  'metala': MixerSpec(
    MetaLA,
    'MetaLA',
    2024,
    '2411.10741',
    gate='channel',
    bidirectional=TWO_PASSES,
  ),
  'log_linear': MixerSpec(
    LogLinear,
    'Log-linear Mamba-2',
    2025,
    '2506.04761',
    gate='scalar',
    bidirectional=TWO_PASSES,
    state='log',
  ),
}
