"""Mixers side by side are the sum of the mixers."""

import numpy as np
import pytest

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers import build_mixer
from tests.layers.built import built

D, N = 16, 4


def test_a_sum_of_scaled_mixers():
  options = {
    'gla:narrow': dict(num_heads=2, chunk_size=4),
    'attention': dict(num_kv_heads=2),
  }
  mixer = built(
    'parallel',
    d_model=D,
    num_heads=N,
    mixers=options,
    input_scales={'attention': 0.5},
    output_scales={'attention': 3, 'gla:narrow': '2'},
  )
  attention, gla = mixer.mixers['attention'], mixer.mixers['gla:narrow']
  assert (gla.sizes['N'], attention.num_heads) == (2, N)
  x = np.random.default_rng(0).standard_normal((2, 7, D)).astype(np.float32)
  expected = 2 * gla(x)[0] + 3 * attention(0.5 * x)[0]
  np.testing.assert_allclose(mixer(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_abilities_are_those_of_all():
  part = {'attention': {}, 'synthesizer': dict(kind='dense', max_len=8)}
  mixer = built('parallel', d_model=D, num_heads=N, mixers=part)
  assert not mixer.packing and not mixer.left_padding
  assert built('parallel', d_model=D, num_heads=N).packing


@pytest.mark.parametrize(
  'options,words',
  [
    (dict(mixers={}), 'must name at least one'),
    (dict(mixers={'atention': {}}), "did you mean 'attention'"),
    (dict(mixers={'gla': {'window': 3}}), 'window=3 is not an option of gla'),
    (dict(mixers={'gla': 3}), r'mixers.gla=3 must be a group of keys'),
    (dict(input_scales={'gla': 2}), "input_scales='gla' is unknown"),
    (dict(output_scales={'gla': 2}), "output_scales='gla' is unknown"),
    (dict(mixers={'attention': {'shared_kv': True}}), 'not possible side by'),
    (dict(mixers={'fnet': {}}), 'is a mixer of encoders'),
  ],
)
def test_refusals(options, words):
  with pytest.raises(ConfigError, match=words):
    build_mixer('parallel', d_model=D, num_heads=N, rngs=None, **options)
