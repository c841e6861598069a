"""Mixers without a learned gate against dense attention by their kernels.

The whole mixer, from the input to the output, in float64 against numpy; the
sequence is packed from segments of 5, 1 and 7 tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers import build_mixer
from efficient_attn.layers.mixers.linear.lightning import log_decays
from tests.layers.built import built
from tests.oracles import feature_maps as oracle

B, D, N = 2, 24, 3
IDS = np.repeat([[1, 2, 3]], [5, 1, 7], axis=1).repeat(B, 0)
T = IDS.shape[1]
# Gates and random projections are used in float32, whatever the input.
TOLERANCE = 2e-6


def make(name, *, causal=True, noise=0.1, **options):
  """A mixer with noise on its parameters, and the parameters as float64."""
  mixer = built(
    name, d_model=D, num_heads=N, causal=causal, chunk_size=4, **options
  )
  graphdef, params = nnx.split(mixer)
  leaves, treedef = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  leaves = [
    np.asarray(p, np.float64) + noise * rng.standard_normal(p.shape)
    for p in leaves
  ]
  return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


def run(mixer, x, ids=None):
  call = jax.jit(lambda mixer, x, ids: mixer(x, Context(segment_ids=ids))[0])
  with jax.enable_x64(True):
    return np.asarray(call(*jax.tree.map(jnp.asarray, (mixer, x, ids))))


def inputs(seed=2):
  return np.random.default_rng(seed).standard_normal((B, T, D))


def project(projection, x):
  """W x + b by a Projection from [B, T, D] to heads, or back."""
  weight = np.asarray(projection.weight[...])
  y = np.tensordot(x, weight, projection.num_inputs)
  if projection.bias is not None:
    y = y + np.asarray(projection.bias[...])
  return y


def qkv(mixer, x):
  parts = mixer.qkv.query, mixer.qkv.key, mixer.qkv.value
  return [project(part, x) for part in parts]


def value(p):
  return np.asarray(p[...])


def linear(m, q, k, x):
  return oracle.dot(oracle.elu_plus_one(q), oracle.elu_plus_one(k))


def performer(m, q, k, x):
  w = value(m.projection)
  if m.hyperbolic:
    w = np.concatenate([w, -w])
  phi = lambda x: np.apply_along_axis(  # noqa: E731
    oracle.positive_random, -1, x / x.shape[-1] ** 0.25, w
  )
  return oracle.dot(phi(q), phi(k))


def rfa(m, q, k, x):
  q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
  w = value(m.projection) * value(m.sigma)[:, None]
  weights = oracle.fourier_kernel(q, k, w)
  if m.gate is None:
    return weights
  gate = 1 / (1 + np.exp(-project(m.gate, x)))
  write = np.moveaxis(1 - gate, 1, 2)[:, :, None]
  return weights * write * oracle.decays(np.log(gate))


def sana(m, q, k, x):
  if len(m.norms):
    q, k = (
      a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * value(norm.scale)
      for norm, a in zip(m.norms, (q, k), strict=True)
    )
  return oracle.dot(oracle.relu(q), oracle.relu(k))


def qt_vit(m, q, k, x):
  if len(m.scalars):
    return oracle.taylor_diagonal(q, k, *map(value, m.scalars))
  return based(m, q, k, x)


def based(m, q, k, x):
  return oracle.taylor(q / q.shape[-1] ** 0.5, k)


def rebased(m, q, k, x):
  q, k = (
    oracle.layer_norm(a, value(norm.scale), value(norm.bias), eps=1e-5)
    for norm, a in zip(m.norms, (q, k), strict=True)
  )
  return oracle.dot(q, k) ** 2


def hedgehog(m, q, k, x):
  phi_q, phi_k = (
    oracle.hedgehog(np.einsum('btnh,nhf->btnf', a, value(weight)))
    for weight, a in zip(m.maps, (q, k), strict=True)
  )
  return oracle.dot(phi_q, phi_k)


CASES = {
  'linear': (linear, {}),
  'performer': (performer, {}),
  'performer-hyperbolic': (performer, {'hyperbolic': True, 'nb_features': 5}),
  'rfa': (rfa, {}),
  'rfa-gate': (rfa, {'gate': True, 'nb_features': 16}),
  'cosformer': (lambda m, q, k, x: oracle.cosine(q, k, T), {}),
  'cosformer-max': (
    lambda m, q, k, x: oracle.cosine(q, k, 16),
    {'max_length': 16},
  ),
  'sana': (sana, {}),
  'sana-norm': (sana, {'qk_norm': True}),
  'qt_vit': (qt_vit, {}),
  'qt_vit-full': (qt_vit, {'compact': False}),
  'based': (based, {}),
  'rebased': (rebased, {}),
  'hedgehog': (hedgehog, {}),
}


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('case', sorted(CASES))
def test_is_attention_by_its_kernel(case, causal):
  kernel, options = CASES[case]
  mixer, x = make(case.split('-')[0], causal=causal, **options), inputs()
  q, k, v = qkv(mixer, x)
  weights = kernel(mixer, q, k, x)
  o = oracle.attend(weights, v, oracle.visible(IDS, causal))
  y = run(mixer, x, IDS)
  np.testing.assert_allclose(y, project(mixer.out, o), atol=TOLERANCE)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('width', [1, 3, 5])
def test_sla_adds_a_convolution_of_the_values(width, causal):
  mixer = make('slab', causal=causal, dwc_width=width)
  x = inputs()
  q, k, v = qkv(mixer, x)
  weights = oracle.dot(oracle.relu(q), oracle.relu(k))
  o = oracle.attend(weights, v, oracle.visible(IDS, causal))
  o = o + oracle.depthwise(v, value(mixer.weight), IDS, causal)
  expected = project(mixer.out, o + value(mixer.bias))
  y = run(mixer, x, IDS)
  np.testing.assert_allclose(y, expected, atol=TOLERANCE)


EARLIER = dict(rates='linear', silu_values=False, norm_scale=False)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(
  'options',
  [{}, {'depth': 0.5}, {'decay': False}, EARLIER, EARLIER | {'depth': 0.5}],
  ids=str,
)
def test_lightning(options, causal):
  mixer, x = make('lightning', causal=causal, **options), inputs()
  q, k, v = qkv(mixer, x)
  linear, depth = 'rates' in options, options.get('depth', 0)
  weights = oracle.dot(oracle.silu(q), oracle.silu(k))
  if options.get('decay', True):
    # ALiBi: of two heads 2^-4 and 2^-8, the third is the first of four.
    rates = np.array([2**-4, 2**-8, 2**-2]) * (1 - depth + 1e-5)
    if linear:
      rates = 8 * np.arange(N) / N * (1 - depth)
    gate = np.broadcast_to(-rates, (B, T, N))
    weights = weights * oracle.decays(gate)
  mask = oracle.visible(IDS, causal)
  v = v if linear else oracle.silu(v)
  o = oracle.attend(weights, v, mask, normalize=False)
  o = o / np.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6)
  if not linear:
    o = o * value(mixer.norm.scale)
  gate = 1 / (1 + np.exp(-project(mixer.gate, x)))
  y = run(mixer, x, IDS)
  np.testing.assert_allclose(y, project(mixer.out, o * gate), atol=TOLERANCE)


def test_rates_of_lightning_are_those_of_minimax():
  # base ** exponent * factor of its attention in transformers, 64 heads.
  for layer in (0, 7, 79):
    factor = 1 - layer / (80 - 1 + 1e-5) + 1e-5
    rates = (1 / 2 ** (8 / 64)) ** (np.arange(64) + 1) * factor
    found = log_decays(64, 'alibi', layer / (80 - 1 + 1e-5))
    np.testing.assert_allclose(found, -rates, rtol=1e-6)
  earlier = log_decays(4, 'linear', 0.0)
  np.testing.assert_array_equal(earlier, [0.0, -2, -4, -6])


def test_chela():
  mixer, x = make('chela'), inputs()
  heads = x.reshape(B, T, N, D // N)
  short = oracle.depthwise(heads, value(mixer.short.weight), IDS, True)
  rates, mixture = value(mixer.rates), value(mixer.mixture)
  z = oracle.long_conv(oracle.silu(short), rates, mixture, IDS)
  q, k = (
    z * scale + shift
    for scale, shift in zip(value(mixer.scale), value(mixer.shift), strict=True)
  )
  v = oracle.silu(project(mixer.value, x))
  weights = oracle.dot(q, k) / (D // N) ** 0.5
  mask = oracle.visible(IDS, True)
  o = oracle.attend(weights, v, mask, normalize=False)
  o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6)
  gate = oracle.silu(project(mixer.gate, z.reshape(x.shape)))
  expected = project(mixer.out, o * value(mixer.norm.scale) * gate)
  y = run(mixer, x, IDS)
  np.testing.assert_allclose(y, expected, atol=TOLERANCE)


@pytest.mark.parametrize('name', ['performer', 'rfa'])
def test_random_features_approach_softmax(name):
  x = inputs() / 2
  errors = []
  for nb_features in (64, 64 * 64):
    mixer = make(name, nb_features=nb_features, noise=0)
    q, k, v = qkv(mixer, x)
    if name == 'performer':
      q = q / q.shape[-1] ** 0.5
    else:
      q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    weights = np.exp(oracle.dot(q, k))
    o = oracle.attend(weights, v, oracle.visible(IDS, True))
    exact = project(mixer.out, o)
    error = run(mixer, x, IDS) - exact
    errors.append((error**2).mean() ** 0.5 / exact.std())
  # 64 times the features: about an eighth of the error, and a small one.
  assert errors[1] < 0.03 and errors[0] > 3 * errors[1]


@pytest.mark.parametrize('name', ['performer', 'rfa'])
def test_projections_are_not_trained(name):
  mixer, x = make(name), inputs()

  @jax.jit
  @jax.grad
  def grad(mixer, x):
    return jnp.sum(mixer(x)[0] ** 2)

  with jax.enable_x64(True):
    grads = grad(*jax.tree.map(jnp.asarray, (mixer, x)))
  np.testing.assert_array_equal(grads.projection[...], 0)
  assert np.all(grads.qkv.query.weight[...])
  assert mixer.projection.get_metadata('weight_decay') is False
  if name == 'rfa':
    assert np.all(grads.sigma[...])


def test_nothing_in_common_gives_zero():
  # The first token: its query and its key share no positive channel.
  mixer, x = make('sana', noise=0), inputs()
  weight = np.zeros(mixer.qkv.query.weight.shape)
  weight[0] = 1
  mixer.qkv.query.weight[...] = weight
  mixer.qkv.key.weight[...] = -weight
  x[:, :, 0] = np.where(np.arange(T) < T - 1, 1, -1)
  y = run(mixer, x)
  np.testing.assert_array_equal(y[:, :-1], 0)


def test_cosformer_refuses_what_is_too_long():
  mixer = make('cosformer', max_length=T - 1)
  x = jnp.asarray(inputs(), jnp.float32)
  with pytest.raises(ConfigError, match='raise max_length'):
    mixer(x)
  with pytest.raises(ConfigError, match='raise max_length'):
    mixer.init_cache(B, T, x.dtype)
  call = lambda x, ids: mixer(x, Context(segment_ids=ids))[0]  # noqa: E731
  assert jax.eval_shape(call, x[:, 1:], None).shape == (B, T - 1, D)
  assert jax.eval_shape(call, x, jnp.asarray(IDS)).shape == x.shape


def test_cosformer_weighs_by_the_length_of_the_row():
  """So that it is on at any length: the farthest token has weight ~ 0."""
  mixer, x = make('cosformer'), inputs()
  for length in (6, T):
    q, k, v = qkv(mixer, x[:, :length])
    ids = np.ones((B, length), int)
    weights = oracle.cosine(q, k, length)
    o = oracle.attend(weights, v, oracle.visible(ids, True))
    y = run(mixer, x[:, :length])
    np.testing.assert_allclose(y, project(mixer.out, o), atol=TOLERANCE)


def test_cosformer_decodes_as_one_call_with_the_room_of_the_cache():
  mixer, x = make('cosformer'), jnp.asarray(inputs(), jnp.float32)
  step = jax.jit(lambda x, cache: mixer(x, cache=cache))
  for room in (T, T + 3):
    # What follows does not matter, but that there is room for it does.
    longer = jnp.pad(x, ((0, 0), (0, room - T), (0, 0)))
    expected = mixer(longer)[0][:, :T]
    cache = mixer.init_cache(B, room, x.dtype)
    first, cache = step(x[:, :7], cache)
    second, _ = step(x[:, 7:], cache)
    y = jnp.concatenate([first, second], 1)
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_sla_refuses_an_even_width_in_an_encoder():
  assert make('slab', dwc_width=4) is not None
  with pytest.raises(ConfigError, match='odd in an encoder'):
    make('slab', dwc_width=4, causal=False)


def test_published_sizes():
  based, hedgehog = make('based'), make('hedgehog')
  assert based.init_cache(1, 1, 'float32').state[1].shape == (1, N, 153)
  state = hedgehog.init_cache(1, 1, 'float32').state[0]
  assert state.shape == (1, N, 2 * D // N, D // N)
  mixer = build_mixer('performer', d_model=64, num_heads=1, rngs=nnx.Rngs(0))
  assert mixer.projection.shape == (int(64 * np.log(64)), 64)
