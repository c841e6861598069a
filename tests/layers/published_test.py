"""Defaults and initial values of mixers against those of their released code.

The formulas are those of flash-linear-attention (fla), state-spaces/mamba and
RWKV-LM, written out again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from efficient_attn.layers.mixers import build_mixer
from tests.layers.built import built

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


def test_eps_of_the_feature_norms_of_rebased():
  assert [n.eps for n in shapes('rebased').norms] == [1e-5] * 2
  assert [n.eps for n in shapes('rebased', norm_eps=0.5).norms] == [0.5] * 2


def test_eps_reaches_the_gated_norm_of_mesa():
  gated = shapes('mesa', output_gate=True, norm_eps=0.5)
  assert gated.out.norm.eps == 0.5 and hasattr(gated.out, 'gate')


HEADS = 512


@functools.cache
def wide(name):
  """As many heads as a distribution needs, of one channel each."""
  options = dict(expand_k=1, expand_v=1) if name == 'gated_deltanet' else {}
  return built(name, d_model=HEADS, num_heads=HEADS, **options)


def uniform(values, low, high):
  """Whether the values are as good as drawn from U(low, high)."""
  values = np.asarray(values, np.float64).ravel()
  assert low <= values.min() and values.max() <= high
  return scipy.stats.kstest(values, 'uniform', (low, high - low)).pvalue > 0.01


@pytest.mark.parametrize(
  'name,low',
  [('deltaproduct', 0), ('gated_deltanet', 0), ('kda', 1), ('mamba2', 1)],
)
def test_rates_and_time_steps(name, low):
  mixer = wide(name)
  gate = mixer if name == 'mamba2' else mixer.gate
  rates = np.exp(gate.a_log[...])
  assert rates.shape == (HEADS,) and uniform(rates, low, 16.0001)
  assert rates.min() < low + 1
  steps = np.asarray(jax.nn.softplus(gate.dt_bias[...]), np.float64)
  assert uniform(np.log10(steps), -3.0001, -0.9999)
  assert not gate.a_log.weight_decay and not gate.dt_bias.weight_decay


def test_comba_starts_as_gated_deltanet_with_its_corrections_at_one():
  mixer = built('comba', d_model=16, num_heads=2)
  gate = built('gated_deltanet', d_model=16, num_heads=2).gate
  np.testing.assert_array_equal(mixer.gate.a_log[...], gate.a_log[...])
  np.testing.assert_array_equal(mixer.erase[...], 1)
  np.testing.assert_array_equal(mixer.correction[...], 1)


def test_rates_of_log_linear_count_the_heads():
  mixer = built('log_linear', d_model=16, num_heads=4)
  np.testing.assert_allclose(np.exp(mixer.a_log[...]), [1, 2, 3, 4], rtol=1e-6)
  assert not mixer.a_log.weight_decay


@pytest.mark.parametrize('layer', [0, 2, 4])
def test_rwkv7_starts_as_in_rwkv_lm(layer):
  """Layer 0, 2 or 4 of a model of 5; RWKV-LM's l / L is taken for depth."""
  C, H, N, depth = 24, 3, 8, layer / 4
  mixer = built('rwkv7', d_model=C, num_heads=H, depth=depth, decay_rank=32)
  wanted = {name: np.zeros((H, N)) for name in ('w0', 'a0', 'k_k')}
  for n in range(C):
    line = n / (C - 1)
    zigzag = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * abs(zigzag)
    slow = -6 + 6 * line ** (1 + depth**0.3)
    head, channel = divmod(n, N)
    wanted['w0'][head, channel] = slow + 0.5 + zigzag * 2.5
    wanted['a0'][head, channel] = -0.19 + zigzag * 0.3 + (line - 0.5) * 0.4
    wanted['k_k'][head, channel] = 0.71 - (line - 0.5) * 0.1
  for name, found in (
    ('w0', mixer.decay_bias),
    ('a0', mixer.rate_bias),
    ('k_k', mixer.removal),
  ):
    np.testing.assert_allclose(found[...], wanted[name], atol=2e-6)
  np.testing.assert_allclose(mixer.replacement[...], 1.02)
  np.testing.assert_allclose(mixer.bonus[...], -0.04)
  powers = dict(r=0.2, w=0.9, k=0.7, v=0.7, a=0.9, g=0.2)
  for name, found in zip('rwkvag', mixer.mix[...], strict=True):
    ramp = np.arange(C) / C
    share = 1 - ramp ** (powers[name] * (1 - depth))
    np.testing.assert_allclose(found, share, atol=2e-6)
  for low in (mixer.decay, mixer.rate, mixer.gate):
    np.testing.assert_array_equal(low.down.weight[...], 0)
    up = np.asarray(low.up.weight[...]).reshape(-1, C)
    rank = len(up)  # more rows than channels: the columns are orthogonal
    assert rank > C
    gram = up.T @ up
    np.testing.assert_allclose(gram, 0.01 * rank / C * np.eye(C), atol=1e-6)


def test_low_ranks_of_rwkv7_start_with_orthogonal_rows():
  mixer = built('rwkv7', d_model=16, num_heads=2, gate_rank=4)
  up = mixer.gate.up.weight[...].reshape(4, 16)
  np.testing.assert_allclose(up @ up.T, 0.01 * jnp.eye(4), atol=1e-6)
