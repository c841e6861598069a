"""Mixers over elementwise recurrences, against loops from their papers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers import build_mixer
from efficient_attn.layers.token_shift import token_shift
from tests.layers.built import built
from tests.oracles import elementwise as oracles
from tests.oracles.elementwise import sigmoid
from tests.oracles.linear_attention import short_conv

B, T, D, N = 2, 11, 16, 4


@functools.cache
def make(name, **options):
  return built(name, d_model=D, num_heads=N, **options)


def noisy(mixer):
  """Biases and gates that start at zero would hide mistakes."""
  rng = np.random.default_rng(2)
  graphdef, params = nnx.split(mixer)
  return nnx.merge(
    graphdef,
    jax.tree.map(
      lambda p: p + 0.2 * rng.standard_normal(p.shape).astype(np.float32),
      params,
    ),
  )


def inputs():
  return np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)


def value(p):
  return np.asarray(p[...], np.float64)


def project(projection, x):
  weight = value(projection.weight)
  inner = projection.num_inputs
  y = np.tensordot(x, weight, (range(x.ndim - inner, x.ndim), range(inner)))
  return y if projection.bias is None else y + value(projection.bias)


def headwise(layer, x):
  y = np.einsum('btnh,nhv->btnv', x, value(layer.weight))
  return y if layer.bias is None else y + value(layer.bias)


def conv(layer, x):
  def flat(a):
    return a.reshape(*a.shape[:-2], -1)

  weight, bias = flat(value(layer.weight)), flat(value(layer.bias))
  return short_conv(flat(x), weight, bias=bias)[0].reshape(x.shape)


def silu(x):
  return x * sigmoid(x)


def gelu(x):
  return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softplus(x):
  return np.log1p(np.exp(x))


def normalize(norm, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)
  return x * value(norm.scale) + value(norm.bias)


def hgrn(m, x):
  c = silu(project(m.real, x)) + 1j * silu(project(m.imaginary, x))
  low = m.lower_bound
  decay = low + (1 - low) * sigmoid(project(m.forget, x))
  h, out = np.zeros((B, N, D // N), complex), []
  for t in range(T):
    h = (
      decay[:, t] * np.exp(1j * value(m.theta)) * h
      + (1 - decay[:, t]) * c[:, t]
    )
    out.append(np.concatenate([h.real.reshape(B, D), h.imag.reshape(B, D)], 1))
  return project(
    m.out, normalize(m.norm, np.stack(out, 1)) * silu(project(m.gate, x))
  )


def rg_lru(m, x):
  u = conv(m.conv, project(m.value, x))
  r, i = (sigmoid(headwise(g, u)) for g in (m.recurrence_gate, m.input_gate))
  a = sigmoid(-value(m.rate)) ** (8 * r)
  h, out = np.zeros((B, *m.rate.shape)), []
  for t in range(T):
    scale = 1 if t == 0 and m.counts else np.sqrt(1 - a[:, t] ** 2)
    h = a[:, t] * h + scale * i[:, t] * u[:, t]
    out.append(h)
  return project(m.out, np.stack(out, 1) * gelu(project(m.gate, x)))


def mamba(m, x):
  u = silu(conv(m.conv, project(m.value, x)))
  low, keys, queries = np.split(project(m.select, u), m.splits, -1)
  if m.select_norm != 'none':
    low, keys, queries = (
      a / np.sqrt(np.mean(a**2, -1, keepdims=True) + m.norm_eps)
      for a in (low, keys, queries)
    )
  if m.select_norm == 'scaled':
    scales = [value(norm.scale) for norm in m.select_norms]
    low, keys, queries = low * scales[0], keys * scales[1], queries * scales[2]
  y, _ = oracles.selective_scan(
    u,
    softplus(project(m.dt, low) + value(m.dt_bias)),
    -np.exp(value(m.a_log)),
    keys,
    queries,
    value(m.skip),
    discretization=m.options['discretization'],
  )
  return project(m.out, y * silu(project(m.gate, x)))


def rwkv4(m, x):
  before = np.concatenate([0 * x[:, :1], x[:, :-1]], 1)
  r, k, v = (
    project(layer, value(mu) * x + (1 - value(mu)) * before)
    for layer, mu in (
      (m.receptance, m.mix_receptance),
      (m.key, m.mix_key),
      (m.value, m.mix_value),
    )
  )
  wkv, _ = oracles.wkv4(
    k, v, log_decay=-np.exp(value(m.rate)), bonus=value(m.bonus)
  )
  return project(m.out, sigmoid(r) * wkv)


def slstm(m, x):
  x = x.reshape(B, T, N, D // N)
  smooth = silu(conv(m.conv, x))
  gates = [headwise(m.z, x), headwise(m.i, smooth)]
  gates += [headwise(m.f, smooth), headwise(m.o, x)]
  h, _ = oracles.slstm(*gates, value(m.recurrent), bias=value(m.bias))
  shared = m.norm.bias is not None
  h = h - h.mean(-1, keepdims=True)
  h = h / np.sqrt(np.mean(h**2, -1, keepdims=True) + (1e-6 if shared else 1e-5))
  y = h * value(m.norm.scale) + (value(m.norm.bias) if shared else 0)
  return y.reshape(B, T, D)


@pytest.mark.parametrize(
  'reference,options',
  [
    (hgrn, {}),
    (hgrn, {'lower_bound': 0.7}),
    (mamba, {}),
    (mamba, {'discretization': 'zoh'}),
    (mamba, {'select_norm': 'plain', 'norm_eps': 0.1}),
    (mamba, {'select_norm': 'scaled', 'in_bias': True, 'out_bias': True}),
    (rg_lru, {}),
    (rg_lru, {'scale_first': False, 'in_bias': True, 'out_bias': True}),
    (rwkv4, {'depth': 0.5}),
    (slstm, {'depth': 0.5}),
    (slstm, {'shared_norm': True}),
  ],
)
def test_mixer_is_its_papers_equations(reference, options):
  mixer = noisy(make(reference.__name__, **options))
  x = inputs()
  y = jax.jit(lambda m, x: m(x)[0])(mixer, jnp.asarray(x))
  wanted = reference(mixer, np.asarray(x, np.float64))
  np.testing.assert_allclose(y, wanted, atol=3e-6 * (1 + np.abs(wanted).max()))


def test_published_initialisations():
  mixer = make('mamba')
  dt = softplus(value(mixer.dt_bias))
  assert 1e-3 <= dt.min() * 1.0001 and dt.max() <= 0.1001
  assert np.ptp(np.log(dt)) > 3  # log-uniform, not all the same
  np.testing.assert_allclose(
    np.exp(value(mixer.a_log)) - np.arange(1, 17), 0, atol=1e-5
  )
  assert mixer.select.weight.shape[-1] == 1 + 2 * 16  # rank 16 / 16

  mixer = make('rg_lru')
  decay = sigmoid(-value(mixer.rate)) ** 8
  assert 0.9 <= decay.min() * 1.0001 and decay.max() <= 0.9991
  assert np.ptp(decay) > 0.07
  assert mixer.sizes == dict(N=N, H=5)  # 4/3 of 16 channels, in 4 heads

  rate = value(make('rwkv4').rate).ravel()
  assert rate[0] == -5
  assert rate[-1] == 3
  np.testing.assert_array_less(0, np.diff(rate))
  rate = value(make('rwkv4', depth=1.0).rate).ravel()
  assert rate[0] == -5 and rate[-1] == 3 and rate[8] < -2

  mixer = make('slstm')
  assert mixer.norm.scale.shape == (N, D // N)  # as NX-AI's, without a bias
  bias = value(mixer.bias)
  np.testing.assert_allclose(bias[2][:, [0, -1]], [[5, -7]] * N, atol=1e-5)
  np.testing.assert_array_equal(bias[[0, 1, 3]], 0)
  np.testing.assert_array_equal(value(mixer.recurrent), 0)


@pytest.mark.parametrize(
  'name,exempt',
  [
    ('hgrn', ['theta']),
    ('mamba', ['a_log', 'dt_bias', 'skip']),
    ('rg_lru', ['rate']),
    ('rwkv4', ['bonus', 'mix_key', 'rate']),
    ('slstm', ['bias']),
  ],
)
def test_gates_do_not_decay(name, exempt):
  mixer = make(name)
  for parameter in exempt:
    assert getattr(mixer, parameter).weight_decay is False
  decayed = [
    p
    for p in jax.tree.leaves(
      nnx.state(mixer), is_leaf=lambda p: isinstance(p, nnx.Param)
    )
    if p.weight_decay
  ]
  assert decayed and all(p.ndim >= 2 for p in decayed)


def test_shut_gate_of_rg_lru_has_finite_gradients():
  # sigmoid(-200) is zero in float32: a = 1 and sqrt(1 - a^2) = 0.
  mixer = make('rg_lru')
  graphdef, params = nnx.split(mixer)

  def loss(params, x):
    mixer = nnx.merge(graphdef, params)
    mixer.recurrence_gate.bias[...] -= 200.0
    return jnp.sum(mixer(x)[0])

  grads = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(inputs()))
  chex.assert_tree_all_finite(grads)


def test_wrong_options():
  for name in ('hgrn', 'mamba', 'rwkv4', 'slstm'):
    with pytest.raises(ConfigError, match='num_heads=3 does not divide'):
      build_mixer(name, d_model=D, num_heads=3, rngs=nnx.Rngs(0))
  for name in ('mamba', 'rg_lru', 'slstm'):
    with pytest.raises(ConfigError, match='conv_width=0'):
      build_mixer(name, d_model=D, num_heads=N, rngs=nnx.Rngs(0), conv_width=0)


def test_token_shift():
  x = jnp.arange(1.0, 13.0).reshape(1, 6, 2)
  ids = jnp.array([[0, 0, 1, 1, 1, 0]])
  previous, state = token_shift(x)
  np.testing.assert_array_equal(previous[0, 0], 0)
  np.testing.assert_array_equal(previous[:, 1:], x[:, :-1])
  np.testing.assert_array_equal(state, x[:, -1])
  first, state = token_shift(x[:, :2], segment_ids=ids[:, :2])
  second, _ = token_shift(x[:, 2:], state=state)
  np.testing.assert_array_equal(jnp.concatenate([first, second], 1), previous)
  packed, _ = token_shift(x, segment_ids=ids, state=2 * x[:, 0])
  np.testing.assert_array_equal(
    packed[0, :, 0], [2 * x[0, 0, 0], 1, 0, 5, 7, 0]
  )
