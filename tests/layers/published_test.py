"""Defaults of mixers against those of their released code."""

import functools

import pytest
from flax import nnx

from efficient_attn.layers.mixers import build_mixer

# The eps of the norm of the output; RWKV's is that of o / 8 with 1e-5.
NORM_EPS = {
  'comba': 1e-5,
  'deltanet': 1e-5,
  'deltaproduct': 1e-5,
  'gated_deltanet': 1e-5,
  'gla': 1e-5,
  'gsa': 1e-5,
  'hgrn': 1e-5,
  'hgrn2': 1e-5,
  'kda': 1e-5,
  'log_linear': 1e-5,
  'mamba2': 1e-5,
  'mesa': 1e-5,
  'retention': 1e-5,
  'rodimus': 1e-5,
  'rwkv5': 64e-5,
  'rwkv6': 64e-5,
  'rwkv7': 64e-5,
}


@functools.cache
def shapes(name, **options):
  def build():
    rngs = nnx.Rngs(0)
    return build_mixer(name, d_model=16, num_heads=2, rngs=rngs, **options)

  return nnx.eval_shape(build)


def norm(mixer):
  return mixer.norm if hasattr(mixer, 'norm') else mixer.out.norm


@pytest.mark.parametrize('name', NORM_EPS)
def test_eps_of_the_output_norm(name):
  assert norm(shapes(name)).eps == NORM_EPS[name]
  assert norm(shapes(name, norm_eps=0.5)).eps == 0.5


def test_eps_reaches_the_gated_norm_of_mesa():
  gated = shapes('mesa', output_gate=True, norm_eps=0.5)
  assert gated.out.norm.eps == 0.5 and hasattr(gated.out, 'gate')
