"""Low-rank mixers against their papers' equations, and what they cost."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers import (
  FAMILIES,
  MIXERS,
  build_mixer,
  mixer_options,
)
from efficient_attn.models import cost
from tests.oracles import attention as attention_oracle
from tests.oracles import low_rank as oracle

B, T, D, N = 2, 11, 16, 4
H = D // N


def recipe(name, d_model=D, causal=None, **options):
  if causal is None:
    causal = MIXERS[name].causal

  def build(key):
    return build_mixer(
      name,
      d_model=d_model,
      num_heads=N,
      causal=causal,
      rngs=nnx.Rngs(key),
      **options,
    )

  return build


def make(name, **options):
  """A mixer whose biases are not zero, which would hide mistakes."""
  graphdef, params = nnx.split(recipe(name, **options)(jax.random.key(0)))
  rng = np.random.default_rng(2)
  return nnx.merge(
    graphdef,
    jax.tree.map(
      lambda p: p + 0.2 * rng.standard_normal(p.shape).astype(np.float32),
      params,
    ),
  )


def inputs(length=T):
  return np.random.default_rng(1).standard_normal((B, length, D))


def run(mixer, x):
  with jax.enable_x64(True):
    return np.asarray(jax.jit(lambda mixer, x: mixer(x)[0])(mixer, x))


def value(p):
  return np.asarray(p[...], np.float64)


def project(projection, x):
  weight = value(projection.weight)
  inner = projection.num_inputs
  y = np.tensordot(x, weight, (range(x.ndim - inner, x.ndim), range(inner)))
  return y if projection.bias is None else y + value(projection.bias)


def qkv(mixer, x):
  heads = mixer.qkv
  return tuple(project(p, x) for p in (heads.query, heads.key, heads.value))


def attend(query, key, v, mask=None):
  shape = (len(query), N, query.shape[1], key.shape[1])
  mask = np.broadcast_to(True if mask is None else mask, shape)
  return attention_oracle.attention(query, key, v, mask)[0]


def cross(layer, x, context):
  key, v = project(layer.key, context), project(layer.value, context)
  return project(layer.out, attend(project(layer.query, x), key, v))


def layer_norm(norm, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)
  return x * value(norm.scale) + value(norm.bias)


def rms_norm(norm, x):
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)
  return x * value(norm.scale)


def gelu(x):
  return x * np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)(x)


def relu(x):
  return np.maximum(x, 0)


def latents(mixer):
  return np.broadcast_to(value(mixer.latents), (B, *mixer.latents.shape))


def linformer(mixer, x):
  query, key, v = qkv(mixer, x)
  rows = value(mixer.key_rows)[:, : x.shape[1]]
  others = value(mixer.value_rows)[:, : x.shape[1]]
  key = np.einsum('rs,bsnh->brnh', rows, key)
  v = np.einsum('rs,bsnh->brnh', others, v)
  return project(mixer.out, attend(query, key, v))


def nystrom(mixer, x):
  query, key, v = qkv(mixer, x)
  out = oracle.nystrom(query, key, v, num_landmarks=4, iterations=6)
  return project(mixer.out, out + oracle.convolve(v, value(mixer.taps)))


def fnet(mixer, x):
  def transform(size):
    index = np.arange(size)
    return np.exp(-2j * np.pi * np.outer(index, index) / size)

  tokens, channels = transform(x.shape[1]), transform(x.shape[2])
  return np.real(tokens @ x @ channels)


def perceiver(mixer, x):
  z = latents(mixer)
  for i, layer in enumerate(mixer.layers):
    query = layer_norm(layer.norm, z)
    z = z + cross(layer.attention, query, query if i else x)
    hidden = gelu(project(layer.mlp.up, layer_norm(layer.mlp_norm, z)))
    z = z + project(layer.mlp.down, hidden)
  return cross(mixer.read, x, layer_norm(mixer.norm, z))


def set_transformer(mixer, x):
  z = latents(mixer)
  z = layer_norm(mixer.norm, z + cross(mixer.attention, z, x))
  z = layer_norm(mixer.feed_norm, z + relu(project(mixer.feed, z)))
  return cross(mixer.read, x, z)


def rotate(x, positions):
  """Channels i and i + H / 2 as one complex number."""
  half = x.shape[-1] // 2
  angles = positions[:, None] * 1e4 ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
  return np.concatenate([turned.real, turned.imag], -1)


def funnel(mixer, x):
  size, index = mixer.pool_size, np.arange(x.shape[1])
  pooled = np.stack([oracle.means(row, size) for row in x])
  query = project(mixer.qkv.query, pooled)
  _, key, v = qkv(mixer, x)
  centers = oracle.means(index.astype(float), size)
  o = attend(rotate(query, centers), rotate(key, index), v)
  return project(mixer.out, o)[:, index // size]


def lambda_network(mixer, x):
  query = rms_norm(mixer.query_norm, project(mixer.query, x))
  v = rms_norm(mixer.value_norm, project(mixer.value, x))
  embedding = value(mixer.embedding)
  out = oracle.lambda_layer(query, project(mixer.key, x), v, embedding)
  return out.reshape(x.shape)


def synthesizer(mixer, x):
  length = x.shape[1]
  tables = [value(p) for p in mixer.tables]
  if mixer.kind in ('dense', 'factorized_dense'):
    parts = [
      np.einsum('btnh,nhl->bntl', relu(project(hidden, x)), table)
      + value(bias)[:, None]
      for hidden, table, bias in zip(
        mixer.hidden, tables, mixer.biases, strict=True
      )
    ]
    logits = parts[0]
    if len(parts) == 2:
      logits = oracle.factorized_dense(*parts)
  elif mixer.kind == 'random':
    logits = tables[0][None, :, :length]
  else:
    logits = (tables[0] @ tables[1].swapaxes(1, 2))[None, :, :length]
  mask = np.tri(length, dtype=bool) if mixer.causal else None
  o = oracle.from_logits(logits[..., :length], project(mixer.value, x), mask)
  return project(mixer.out, o)


def transformer_xl(mixer, x):
  relative = mixer.relative
  params = relative.weight, relative.content_bias, relative.position_bias
  o = oracle.transformer_xl(
    *qkv(mixer, x), *map(value, params), memory=mixer.mem_len
  )
  return project(mixer.out, o)


def compressive(mixer, x):
  relative = mixer.relative
  params = relative.weight, relative.content_bias, relative.position_bias
  taps = None if mixer.taps is None else value(mixer.taps)
  slots = oracle.compress(x, mixer.sizes['rate'], mixer.compression, taps)
  entries = project(mixer.qkv.key, slots), project(mixer.qkv.value, slots)
  o = oracle.compressive(
    *qkv(mixer, x), *entries, *map(value, params), **mixer.sizes
  )
  return project(mixer.out, o)


def scored(score):
  def mix(mixer, x):
    query, key, v = qkv(mixer, x)
    logits = score(query, key, *map(value, mixer.weights.params))
    o = oracle.from_logits(logits, v, np.tri(x.shape[1], dtype=bool))
    return project(mixer.out, o)

  return mix


def convolved(conv, x):
  taps = value(conv.weight)
  mixed = np.zeros_like(x)
  for t in range(x.shape[1]):
    for i, tap in enumerate(taps[::-1]):  # the last is for the token itself
      if t >= i:
        mixed[:, t] += tap * x[:, t - i]
  return mixed + (0 if conv.bias is None else value(conv.bias))


def base_conv(mixer, x):
  return project(mixer.project, x) * convolved(mixer.conv, x)


def gated_conv(mixer, x):
  gates = (project(p, x) for p in (mixer.input_gate, mixer.output_gate))
  before, after = gates
  mixed = convolved(mixer.conv, before * project(mixer.value, x))
  return project(mixer.out, after * mixed)


COMPRESSIVE = dict(mem_len=4, compressed_len=3, compression_rate=2)
CASES = {
  'additive': (scored(oracle.additive), [{}]),
  'base_conv': (base_conv, [{}, dict(conv_width=1)]),
  'compressive': (
    compressive,
    [COMPRESSIVE | dict(compression=c) for c in ('conv', 'max', 'mean')],
  ),
  'fnet': (fnet, [{}]),
  'gated_conv': (gated_conv, [{}, dict(conv_width=2, bias=True)]),
  'funnel': (funnel, [dict(pool_size=2), dict(pool_size=4)]),
  'lambda_network': (lambda_network, [dict(window=5, key_dim=3)]),
  'linformer': (
    linformer,
    [dict(rank=3, max_len=20), dict(rank=5, share_projection=True)],
  ),
  'luong': (scored(oracle.general), [{}]),
  'nystrom': (nystrom, [dict(num_landmarks=4, residual_width=5)]),
  'perceiver': (perceiver, [dict(num_latents=3, num_layers=1)]),
  'set_transformer': (set_transformer, [dict(num_latents=3)]),
  'synthesizer': (
    synthesizer,
    [
      dict(kind='dense', max_len=20),
      dict(kind='dense', max_len=T, causal=False),
      dict(kind='factorized_dense', max_len=12),
      dict(kind='random', max_len=12),
      dict(kind='factorized_random', max_len=12, rank=3),
    ],
  ),
  'transformer_xl': (transformer_xl, [dict(mem_len=4)]),
}


def test_every_row_has_an_oracle():
  assert set(CASES) == {
    *FAMILIES['low_rank'],
    *FAMILIES['attention_free'],
    *('additive', 'luong', 'compressive', 'transformer_xl'),
  }


@pytest.mark.parametrize(
  'name, options',
  [(name, o) for name, (_, cases) in sorted(CASES.items()) for o in cases],
  ids=str,
)
def test_equations(name, options):
  mixer, x = make(name, **options), inputs()
  y, expected = run(mixer, x), CASES[name][0](mixer, x)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-9)


def counts(name, length):
  """The FLOPs and the largest array of a training pass."""
  options = dict(max_len=length, implementation='reference', num_landmarks=16)
  known = mixer_options(name)
  build = recipe(name, 32, **{k: v for k, v in options.items() if k in known})
  mixer = nnx.eval_shape(lambda: build(jax.random.key(0)))

  def step(mixer, x):
    return jax.grad(lambda m, x: m(x)[0].sum(), argnums=(0, 1))(mixer, x)

  x = jax.ShapeDtypeStruct((1, length, 32), jnp.float32)
  return cost.flops(step, mixer, x), cost.largest_array(step, mixer, x)


@pytest.mark.parametrize('name', sorted(CASES))
def test_cost_grows_as_the_row_says(name):
  time = MIXERS[name].time
  length = 2**15 if time == 1 else 2**13
  growth = [
    math.log2(max(b, 1) / max(a, 1))
    for a, b in zip(counts(name, length), counts(name, 2 * length), strict=True)
  ]
  if name == 'fnet':  # transforms are no products, and nothing is larger than x
    assert growth == [0, 1]
    return
  np.testing.assert_allclose(growth, time, atol=0.05)


def test_nystrom_with_all_landmarks_is_attention():
  x = inputs()
  mixer = make('nystrom', num_landmarks=T, iterations=None, residual_width=0)
  exact = project(mixer.out, attend(*qkv(mixer, x)))
  np.testing.assert_allclose(run(mixer, x), exact, rtol=0, atol=1e-6)


def test_linformer_of_full_rank_is_attention():
  mixer, x = make('linformer', rank=T, max_len=T), inputs()
  for rows in (mixer.key_rows, mixer.value_rows):
    rows[...] = jnp.eye(T)
  exact = project(mixer.out, attend(*qkv(mixer, x)))
  np.testing.assert_allclose(run(mixer, x), exact, rtol=0, atol=1e-9)


def test_transformer_xl_with_a_long_memory_is_causal_attention():
  """Without relative terms, and with the memory as long as the sequence."""
  mixer, x = make('transformer_xl', mem_len=T), inputs()
  for p in jax.tree.leaves(
    mixer.relative, is_leaf=nnx.Variable.__instancecheck__
  ):
    p[...] = jnp.zeros_like(p[...])
  exact = attend(*qkv(mixer, x), np.tri(T, dtype=bool))
  exact = project(mixer.out, exact)
  np.testing.assert_allclose(run(mixer, x), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
  'kind', ['factorized_dense', 'factorized_random', 'random']
)
def test_synthesizers_decode(kind):
  mixer = make('synthesizer', kind=kind, max_len=T + 1)
  x = inputs().astype(np.float32)
  step = jax.jit(lambda x, cache: mixer(x, cache=cache))
  cache, parts = mixer.init_cache(B, T, jnp.float32), []
  for a, b in itertools.pairwise((0, 5, 6, T)):
    y, cache = step(x[:, a:b], cache)
    parts.append(y)
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1), run(mixer, inputs()), atol=1e-5
  )


WRONG = [
  ('linformer', dict(max_len=T - 1), 'max_len=10; raise it'),
  ('synthesizer', dict(max_len=T - 1), 'max_len=10; raise it'),
  ('synthesizer', dict(kind='danse'), "did you mean 'dense'"),
  ('nystrom', dict(residual_width=4), 'residual_width=4 must be odd'),
  ('lambda_network', dict(window=4), 'window=4 must be odd'),
  ('compressive', dict(mem_len=6, compression_rate=4), 'not a multiple'),
  ('compressive', dict(compression='median'), "did you mean 'mean'"),
  ('funnel', dict(position='alibi'), 'valid: none, rotary'),
  ('additive', dict(logits_soft_cap=3.0), 'not an option of additive'),
  ('luong', dict(position='alibi'), 'valid: none, rotary'),
]


@pytest.mark.parametrize('name, options, message', WRONG)
def test_wrong_options(name, options, message):
  with pytest.raises(ConfigError, match=message):
    nnx.eval_shape(
      lambda: recipe(name, **options)(jax.random.key(0))(jnp.asarray(inputs()))
    )


@pytest.mark.parametrize('name', ['synthesizer', 'transformer_xl'])
def test_encoders_have_no_cache(name):
  build = recipe(name, causal=False)
  with pytest.raises(NotImplementedError, match='no cache'):
    nnx.eval_shape(
      lambda: build(jax.random.key(0))(jnp.zeros((1, 2, D)), cache={})
    )
