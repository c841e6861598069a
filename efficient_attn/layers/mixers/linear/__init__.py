"""Linear attention without a learned gate: what differs is the kernel."""

from efficient_attn.layers.mixers.linear.based import Based
from efficient_attn.layers.mixers.linear.chela import Chela
from efficient_attn.layers.mixers.linear.cosformer import CosFormer
from efficient_attn.layers.mixers.linear.hedgehog import Hedgehog
from efficient_attn.layers.mixers.linear.lightning import Lightning
from efficient_attn.layers.mixers.linear.linear import LinearAttention
from efficient_attn.layers.mixers.linear.performer import Performer
from efficient_attn.layers.mixers.linear.qt_vit import QTViT
from efficient_attn.layers.mixers.linear.rebased import ReBased
from efficient_attn.layers.mixers.linear.rfa import RFA
from efficient_attn.layers.mixers.linear.sana import Sana
from efficient_attn.layers.mixers.linear.slab import SLAB
from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec

LINEAR = {
  'linear': MixerSpec(
    LinearAttention, 'Linear Transformer', 2020, '2006.16236'
  ),
  'performer': MixerSpec(Performer, 'Performer', 2020, '2009.14794'),
  'rfa': MixerSpec(RFA, 'Random Feature Attention', 2021, '2103.02143'),
  'cosformer': MixerSpec(CosFormer, 'cosFormer', 2022, '2202.08791'),
  'lightning': MixerSpec(
    Lightning, 'Lightning Attention', 2024, '2401.04658', gate='constant'
  ),
  'chela': MixerSpec(
    Chela,
    'CHELA',
    2024,
    '2406.08128',
    forms=('recurrent', 'chunkwise'),
    bidirectional=TWO_PASSES,
  ),
  'sana': MixerSpec(Sana, 'SANA', 2024, '2410.10629'),
  'slab': MixerSpec(SLAB, 'SLAB', 2024, '2405.11582'),
  'qt_vit': MixerSpec(QTViT, 'QT-ViT', 2024, 'NeurIPS 2024'),
  'based': MixerSpec(Based, 'Based', 2024, '2402.18668'),
  'rebased': MixerSpec(ReBased, 'ReBased', 2024, '2402.10644'),
  'hedgehog': MixerSpec(Hedgehog, 'Hedgehog', 2024, '2402.04347'),
}
