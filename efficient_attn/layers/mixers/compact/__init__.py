"""Softmax mixers that keep fewer keys and values."""

from efficient_attn.layers.mixers.compact.mfa import MFA
from efficient_attn.layers.mixers.compact.mla import MLA
from efficient_attn.layers.mixers.compact.tpa import TPA
from efficient_attn.layers.mixers.spec import MixerSpec

FORMS = ('reference', 'blockwise')


COMPACT = {
  'mla': MixerSpec(
    MLA,
    'Multi-head latent attention (MLA)',
    2024,
    '2405.04434',
    forms=('expanded', 'absorbed', *FORMS),
    time=2,
    state=1,
  ),
  'mfa': MixerSpec(
    MFA,
    'Multi-matrix factorization attention (MFA)',
    2024,
    '2412.19255',
    forms=FORMS,
    time=2,
    state=1,
  ),
  'tpa': MixerSpec(
    TPA,
    'Tensor product attention (TPA)',
    2025,
    '2501.06425',
    forms=FORMS,
    time=2,
    state=1,
  ),
}
