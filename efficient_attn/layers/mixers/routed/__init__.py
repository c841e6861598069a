"""Softmax mixers whose sparsity depends on the content."""

from efficient_attn.layers.mixers.routed.clustered import Clustered
from efficient_attn.layers.mixers.routed.dsa import DSA
from efficient_attn.layers.mixers.routed.hash import Hash
from efficient_attn.layers.mixers.routed.moba import MoBA
from efficient_attn.layers.mixers.routed.nsa import NSA
from efficient_attn.layers.mixers.routed.reformer import Reformer
from efficient_attn.layers.mixers.routed.routing import Routing
from efficient_attn.layers.mixers.routed.seer import Seer
from efficient_attn.layers.mixers.routed.sinkhorn import Sinkhorn
from efficient_attn.layers.mixers.routed.vsa import VSA
from efficient_attn.layers.mixers.spec import MixerSpec

FORMS = ('routed',)


ROUTED = {
  'reformer': MixerSpec(
    Reformer,
    'Reformer',
    2020,
    '2001.04451',
    forms=FORMS,
    packing=False,
    state=1,
  ),
  'moba': MixerSpec(
    MoBA,
    'MoBA',
    2025,
    '2502.13189',
    forms=FORMS,
    packing=False,
    state=1,
  ),
  'nsa': MixerSpec(
    NSA,
    'NSA',
    2025,
    '2502.11089',
    time=1.4,
    forms=FORMS,
    packing=False,
    bidirectional=False,
    state=1,
  ),
  'dsa': MixerSpec(
    DSA,
    'DSA',
    2025,
    '2512.02556',
    forms=FORMS,
    time=2,
    state=1,
  ),
  'hash': MixerSpec(
    Hash,
    'HashAttention',
    2024,
    '2412.14468',
    forms=FORMS,
    time=2,
    state=1,
  ),
  'routing': MixerSpec(
    Routing,
    'Routing Transformer',
    2020,
    '2003.05997',
    forms=FORMS,
    packing=False,
    state=1,
  ),
  'clustered': MixerSpec(
    Clustered,
    'Clustered attention',
    2020,
    '2007.04825',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'seer': MixerSpec(
    Seer,
    'SeerAttention',
    2024,
    '2410.13276',
    time=1.2,
    forms=FORMS,
    packing=False,
    state=1,
  ),
  'vsa': MixerSpec(
    VSA,
    'VSA',
    2025,
    '2505.13389',
    forms=FORMS,
    causal=False,
    packing=False,
  ),
  'sinkhorn': MixerSpec(
    Sinkhorn,
    'Sparse Sinkhorn attention',
    2020,
    '2002.11296',
    forms=FORMS,
    packing=False,
    time=1.6,
    state=1,
  ),
}
