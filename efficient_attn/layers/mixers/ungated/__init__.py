"""Linear attention without a learned gate: what differs is the kernel."""

from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec
from efficient_attn.layers.mixers.ungated.based import Based
from efficient_attn.layers.mixers.ungated.chela import Chela
from efficient_attn.layers.mixers.ungated.cosformer import CosFormer
from efficient_attn.layers.mixers.ungated.hedgehog import Hedgehog
from efficient_attn.layers.mixers.ungated.lightning import Lightning
from efficient_attn.layers.mixers.ungated.linear import Linear
from efficient_attn.layers.mixers.ungated.performer import Performer
from efficient_attn.layers.mixers.ungated.qt_vit import QTViT
from efficient_attn.layers.mixers.ungated.rebased import ReBased
from efficient_attn.layers.mixers.ungated.rfa import RFA
from efficient_attn.layers.mixers.ungated.sana import Sana
from efficient_attn.layers.mixers.ungated.sla import SLA

UNGATED = {
  'linear': MixerSpec(Linear, 'Linear Transformer', 2020, '2006.16236'),
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
  'sla': MixerSpec(SLA, 'SLAB', 2024, '2405.11582'),
  'qt_vit': MixerSpec(QTViT, 'QT-ViT', 2024, 'NeurIPS 2024'),
  'based': MixerSpec(Based, 'Based', 2024, '2402.18668'),
  'rebased': MixerSpec(ReBased, 'ReBased', 2024, '2402.10644'),
  'hedgehog': MixerSpec(Hedgehog, 'Hedgehog', 2024, '2402.04347'),
}
