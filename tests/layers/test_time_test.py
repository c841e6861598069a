"""Mixers that learn at test time, whole, against loops from their code.

In float64 from the input to the output: TTT as in ttt-lm-pytorch and
ttt-lm-jax for the Transformer backbone, LaCT as in lact_llm.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.ops.recurrent.muon import JORDAN, TUNED
from tests.layers.built import built
from tests.oracles import fast_weights as oracle

B, T, D, N, C = 2, 11, 16, 2, 4
# Fast weights and rates are used in float32, whatever the input.
TOLERANCE = 3e-6


@functools.cache
def make(name, **options):
  """A mixer with noise on its parameters, as float64."""
  mixer = built(name, d_model=D, num_heads=N, chunk_size=C, **options)
  rng = np.random.default_rng(1)
  graphdef, params = nnx.split(mixer)
  noisy = [
    np.asarray(p, np.float64) + 0.2 * rng.standard_normal(p.shape)
    for p in jax.tree.leaves(params)
  ]
  return nnx.merge(
    graphdef, jax.tree.unflatten(jax.tree.structure(params), noisy)
  )


def inputs():
  return np.random.default_rng(2).standard_normal((B, T, D))


def run(mixer, x):
  call = jax.jit(lambda mixer, x: mixer(x)[0])
  with jax.enable_x64(True):
    return np.asarray(call(*jax.tree.map(jnp.asarray, (mixer, x))))


def value(p):
  return np.asarray(p[...], np.float64)


def project(projection, x):
  y = np.tensordot(x, value(projection.weight), projection.num_inputs)
  return y if projection.bias is None else y + value(projection.bias)


def qkv(mixer, x):
  parts = mixer.qkv.query, mixer.qkv.key, mixer.qkv.value
  return [project(part, x) for part in parts]


def rotate(x, positions, base):
  """Pairs (i, i + H/2) of channels as complex numbers."""
  half = x.shape[-1] // 2
  angle = positions[:, None, None] * base ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], -1)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize('mean_gradient', [True, False])
@pytest.mark.parametrize('gate', [True, False])
@pytest.mark.parametrize('name, rate', [('ttt_linear', 1.0), ('ttt_mlp', 0.1)])
def test_ttt(name, rate, mean_gradient, gate):
  mixer = make(name, mean_gradient=mean_gradient, gate=gate)
  x = inputs()
  q, k, v = qkv(mixer, x)
  places = np.arange(T) % C
  shares = None
  if mean_gradient:
    shares = np.maximum(1 / np.arange(1, C + 1) + value(mixer.shift), 0)
  weights = tuple(
    (value(w), value(b))
    for w, b in zip(mixer.model.weights, mixer.model.biases, strict=True)
  )
  o, _ = oracle.fast_weights(
    rotate(q, places, 10_000.0),
    rotate(k, places, 10_000.0),
    v,
    rate * sigmoid(project(mixer.rate, x)) / (D // N),
    weights=weights,
    norm=(value(mixer.model.scale), value(mixer.model.shift)),
    shares=shares,
    chunk_size=C,
  )
  o = o - o.mean((-2, -1), keepdims=True)
  o = o / np.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6)
  o = o * value(mixer.norm.scale) + value(mixer.norm.bias)
  if gate:
    o = o * oracle.gelu(project(mixer.gate, x))
  expected = project(mixer.out, o)
  np.testing.assert_allclose(run(mixer, x), expected, atol=TOLERANCE)


def test_ttt_starts_from_the_mean():
  mixer = built('ttt_mlp', d_model=D, num_heads=N, chunk_size=C)
  np.testing.assert_array_equal(mixer.shift[...], 0)
  np.testing.assert_allclose(mixer._shares(), [1, 1 / 2, 1 / 3, 1 / 4])
  assert mixer.gate is None
  # Learned below zero, a share is zero.
  mixer.shift[...] = jnp.full(C, -0.3)
  np.testing.assert_allclose(mixer._shares()[2:], [1 / 3 - 0.3, 0], atol=1e-7)


def normalize(x, eps):
  return x / np.sqrt((x**2).sum(-1, keepdims=True) + eps)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'rank': 3, 'muon': True},
    {'rank': 0, 'muon': True, 'tuned_muon': False},
  ],
  ids=str,
)
def test_lact(options):
  mixer, x = make('lact', fast_heads=1, **options), inputs()
  q, k, v = qkv(mixer, x)  # [B, T, 1, D]
  positions = np.arange(T)

  def narrow(y):
    return rotate(y.reshape(B, T, N, D // N), positions, 1e6)

  logits = np.einsum('btnh,bsnh->bnts', narrow(q), narrow(k)) / (D // N) ** 0.5
  distance = positions[:, None] - positions
  logits = np.where((distance >= 0) & (distance < C), logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights = weights / weights.sum(-1, keepdims=True)
  near = np.einsum('bnts,bsnv->btnv', weights, v.reshape(B, T, N, D // N))

  far_q, far_k = (
    narrow(normalize(oracle.silu(y * scale + offset), 1e-6)).reshape(y.shape)
    for y, scale, offset in zip(
      (q, k), value(mixer.scale), value(mixer.offset), strict=True
    )
  )
  start = [
    value(w)
    if hasattr(w, 'axes')
    else value(w.left) @ value(w.right) + np.eye(D) / 2
    for w in mixer.weights
  ]
  rank = options.get('rank', 32)
  for w in (mixer.weights[0], mixer.weights[2]):
    assert w.shape == (1, D, D) if rank == 0 else w.left.shape == (1, D, rank)
  base = np.log(np.expm1(0.001))
  far, _ = oracle.lact(
    far_q,
    far_k,
    oracle.silu(v),
    np.log1p(np.exp(project(mixer.rates, x) + base)),
    weights=start,
    momentum=sigmoid(project(mixer.momentum, x)),
    use_muon=options.get('muon', False),
    muon_steps=None if options.get('tuned_muon', True) else oracle.JORDAN,
    chunk_size=C,
  )
  far = far / np.sqrt((far**2).mean(-1, keepdims=True) + 1e-5)
  gate = oracle.silu(project(mixer.gate, x))[..., None]
  y = near.reshape(v.shape) + gate * far * value(mixer.norm.scale)
  expected = project(mixer.out, y)
  tolerance = 1e-4 if options.get('muon') else TOLERANCE
  np.testing.assert_allclose(run(mixer, x), expected, atol=tolerance)


def test_published_options_of_lact():
  mixer = built('lact', d_model=512, num_heads=8)
  assert mixer.options['muon_steps'] == TUNED != JORDAN
  assert mixer.options['chunk_size'] == mixer.window == 2048
  assert mixer.rotary_base == 1e6 and not mixer.options['use_muon']
  first, middle, last = mixer.weights
  assert first.left.shape == last.left.shape == (4, 128, 32)
  assert middle.shape == (4, 128, 128)
  for w in (first, last):
    matrix = np.asarray(w()) - np.eye(128) / 2
    # Of gains 1/2 and 1/2: a quarter of the matrix that keeps variances.
    np.testing.assert_allclose(matrix.std() * 128**0.5, 0.25, rtol=0.05)
