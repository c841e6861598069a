"""Mixers whose state is a model trained at test time.

Their `chunk_size` is the inner mini-batch, a part of the method.
"""

from efficient_attn.layers.mixers.spec import TWO_PASSES, MixerSpec
from efficient_attn.layers.mixers.test_time.lact import LaCT
from efficient_attn.layers.mixers.test_time.titans import Titans
from efficient_attn.layers.mixers.test_time.ttt import TTTMLP, TTTLinear

FORMS = ('recurrent', 'chunkwise')


TEST_TIME = {
  'ttt_linear': MixerSpec(
    TTTLinear,
    'TTT-Linear',
    2024,
    '2407.04620',
    forms=FORMS,
  ),
  'ttt_mlp': MixerSpec(
    TTTMLP,
    'TTT-MLP',
    2024,
    '2407.04620',
    forms=FORMS,
  ),
  'titans': MixerSpec(
    Titans,
    'Titans (neural memory)',
    2025,
    '2501.00663',
    gate='scalar',
    forms=FORMS,
    bidirectional=TWO_PASSES,
  ),
  'lact': MixerSpec(
    LaCT,
    'LaCT',
    2025,
    '2505.23884',
    forms=FORMS,
  ),
}
