"""Recurrences that forget and select: delta rules and state spaces."""

from efficient_attn.layers.mixers.selective.comba import Comba
from efficient_attn.layers.mixers.selective.deltanet import DeltaNet
from efficient_attn.layers.mixers.selective.deltaproduct import DeltaProduct
from efficient_attn.layers.mixers.selective.gated_deltanet import GatedDeltaNet
from efficient_attn.layers.mixers.selective.kda import KDA
from efficient_attn.layers.mixers.selective.mamba import Mamba
from efficient_attn.layers.mixers.selective.mamba2 import Mamba2
from efficient_attn.layers.mixers.selective.mamba3 import Mamba3
from efficient_attn.layers.mixers.selective.mesa import Mesa
from efficient_attn.layers.mixers.selective.mlstm import MLSTM
from efficient_attn.layers.mixers.selective.rwkv7 import RWKV7
from efficient_attn.layers.mixers.selective.slstm import SLSTM
from efficient_attn.layers.mixers.selective.xlstm_7b import XLSTM7B
from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec

SELECTIVE = {
  'deltanet': MixerSpec(DeltaNet, 'DeltaNet', 2021, '2406.06484'),
  'gated_deltanet': MixerSpec(
    GatedDeltaNet, 'Gated DeltaNet', 2024, '2412.06464', gate='scalar'
  ),
  'deltaproduct': MixerSpec(
    DeltaProduct, 'Gated DeltaProduct', 2025, '2502.10297', gate='scalar'
  ),
  'kda': MixerSpec(
    KDA, 'Kimi Delta Attention', 2025, '2510.26692', gate='channel'
  ),
  'comba': MixerSpec(Comba, 'Comba', 2025, '2506.02475', gate='scalar'),
  'rwkv7': MixerSpec(RWKV7, 'RWKV-7', 2025, '2503.14456', gate='channel'),
  'mamba': MixerSpec(
    Mamba,
    'Mamba',
    2023,
    '2312.00752',
    gate='channel',
    forms=('recurrent', 'chunkwise'),
    bidirectional=TWO_PASSES,
  ),
  'slstm': MixerSpec(
    SLSTM,
    'xLSTM (sLSTM)',
    2024,
    '2405.04517',
    gate='channel',
    forms=('recurrent',),
    bidirectional=TWO_PASSES,
  ),
  'mamba2': MixerSpec(
    Mamba2,
    'Mamba-2',
    2024,
    '2405.21060',
    gate='scalar',
    bidirectional=TWO_PASSES,
  ),
  'mlstm': MixerSpec(
    MLSTM,
    'xLSTM (mLSTM)',
    2024,
    '2405.04517',
    gate='scalar',
    bidirectional=TWO_PASSES,
  ),
  'xlstm_7b': MixerSpec(
    XLSTM7B,
    'xLSTM-7B',
    2025,
    '2503.13427',
    gate='scalar',
    bidirectional=TWO_PASSES,
  ),
  'mamba3': MixerSpec(
    Mamba3,
    'Mamba-3',
    2026,
    '2603.15569',
    gate='scalar',
    bidirectional=TWO_PASSES,
  ),
  'mesa': MixerSpec(
    Mesa,
    'MesaNet',
    2025,
    '2506.05233',
    gate='scalar',
    bidirectional=TWO_PASSES,
  ),
}
