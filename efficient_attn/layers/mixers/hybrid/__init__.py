"""Layers of several mixers side by side."""

from efficient_attn.layers.mixers.hybrid.parallel import Parallel
from efficient_attn.layers.mixers.spec import MixerSpec

HYBRID = {
  'parallel': MixerSpec(
    Parallel,
    'Falcon-H1 (Mamba-2 beside attention)',
    2025,
    '2507.22448',
    gate='scalar',
    forms=('recurrent', 'chunkwise'),
    time=2,
    state=1,
  ),
}
