"""Recurrences whose gates only forget."""

from efficient_attn.layers.mixers.gated.gla import GLA
from efficient_attn.layers.mixers.gated.retention import Retention
from efficient_attn.layers.mixers.spec import MixerSpec

GATED = {
  'retention': MixerSpec(
    Retention, 'RetNet', 2023, '2307.08621', gate='constant'
  ),
  'gla': MixerSpec(
    GLA, 'Gated Linear Attention', 2023, '2312.06635', gate='channel'
  ),
}
