"""Mixers that choose their keys, against the equations of their papers."""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixer import OnGrid
from efficient_attn.layers.mixers import build_mixer
from efficient_attn.layers.mixers.routed.heads import attach
from tests.oracles import routed as oracle
from tests.oracles import routed_clusters as clusters

B, T, D, N = 2, 20, 16, 2
H = D // N


def build(name, causal=True, **options):
  """A mixer with noise for all its parameters, which compiles nothing."""

  def init():
    return build_mixer(
      name,
      d_model=D,
      num_heads=N,
      causal=causal,
      rngs=nnx.Rngs(0),
      **options,
    )

  graphdef, params = nnx.split(nnx.eval_shape(init))
  rng = np.random.default_rng(0)
  noise = jax.tree.map(
    lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), params
  )
  return nnx.merge(graphdef, noise)


def inputs(seed=0, length=T):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((B, length, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnames='grid')
def run(mixer, x, grid=()):
  return mixer(x, Context(grid=grid))[0]


def project(x, p):
  """x [.., D] times the weight of a projection, and its bias."""
  y = np.tensordot(np.asarray(x, np.float64), p.weight[...], 1)
  return y if p.bias is None else y + p.bias[...]


def heads(mixer, x):
  qkv = mixer.qkv
  return [project(x, p) for p in (qkv.query, qkv.key, qkv.value)]


def check(mixer, x, o, grid=()):
  expected = np.einsum('btnh,nhd->btd', o, mixer.out.weight[...])
  y = run(mixer, x, grid)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-5)


def relu(x):
  return np.maximum(x, 0)


def rotate(x, places, base=10_000.0):
  half = x.shape[-1] // 2
  angle = places[:, None] * base ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def test_short_sequences_see_everything():
  """With the published sizes: the same numbers as softmax attention."""
  x = inputs()
  attention = build('attention', num_kv_heads=1)
  state = nnx.state(attention, nnx.Param)
  expected = run(attention, x)
  for name in ('moba', 'seer', 'dsa', 'hash'):
    mixer = build(name, num_kv_heads=1)
    nnx.update(mixer, state)
    np.testing.assert_allclose(run(mixer, x), expected, atol=1e-5)


def test_nsa():
  sizes = dict(
    compress_size=4, compress_stride=2, block_size=4, top_k=4, window=5
  )
  mixer = build('nsa', num_kv_heads=1, **sizes)
  x = inputs()
  q, k, v = heads(mixer, x)
  short, near = (project(x, p) for p in (mixer.compressed, mixer.window))
  compressed = [
    oracle.nsa_compress(
      short[..., i, :],
      *(p[...] for p in (mlp.places, mlp.up, mlp.down)),
      size=4,
      stride=2,
    )
    for i, mlp in enumerate(mixer.compress)
  ]
  turn = functools.partial(rotate, places=np.arange(T))
  o = oracle.nsa(
    turn(q),
    q,  # of the compressed branch, which has places inside frames only
    compressed,
    (turn(k), v),
    (turn(near[..., 0, :]), near[..., 1, :]),
    1 / (1 + np.exp(-project(x, mixer.gate))),
    sizes=mixer.sizes,
  )
  check(mixer, x, o)


def test_reformer():
  options = dict(num_hashes=2, num_buckets=(2, 4), chunk_size=3)
  mixer = build('reformer', **options)
  x = inputs()
  plain, value = project(x, mixer.query), project(x, mixer.value)
  ids = clusters.hash_buckets(plain, [np.array(r) for r in mixer.rotations()])
  assert ids.max() == 7  # of 2 x 4 buckets
  query = rotate(plain, np.arange(T))
  key = query / np.linalg.norm(query, axis=-1, keepdims=True)
  o = clusters.reformer(query, key, value, ids, chunk_size=3, causal=True)
  check(mixer, x, o)
  other = build('reformer', seed=1, **options)
  for a, b in zip(mixer.rotations(), other.rotations(), strict=True):
    assert np.abs(a - b).max() > 0.1


@pytest.mark.parametrize('causal', [True, False])
def test_routing(causal):
  mixer = build(
    'routing', causal, position='none', num_clusters=3, cluster_size=4
  )
  x = inputs()
  mu = np.asarray(mixer.centroids[...])
  query = clusters.routing_normalize(project(x, mixer.query))
  value = project(x, mixer.value)
  if causal:
    ids = np.einsum('btnh,nch->btnc', query, mu).argmax(-1)[..., None]
    o = clusters.buckets(
      query,
      query,
      value,
      ids,
      chunk_size=4,
      causal=True,
      own=True,
      scale=None,
    )
  else:
    key = clusters.routing_normalize(project(x, mixer.key))
    o = clusters.balanced_clusters(query, key, value, mu, size=4)
  check(mixer, x, o)


def test_clustered():
  mixer = build(
    'clustered', False, position='none', num_clusters=4, top_k=3, num_bits=16
  )
  x = inputs()
  query, key, value = heads(mixer, x)
  projections = np.asarray(jax.random.normal(jax.random.key(0), (N, H, 16)))
  ids = clusters.lloyd(query, projections, num_clusters=4, iterations=10)
  check(mixer, x, clusters.clustered(query, key, value, ids, top_k=3))


@pytest.mark.parametrize('causal', [True, False])
def test_sinkhorn(causal):
  mixer = build('sinkhorn', causal, position='none', block_size=4, max_blocks=6)
  x = inputs()
  if causal:
    z = np.stack([x[:, : i + 1].mean(1) for i in range(0, T, 4)], 1)
  else:
    z = x.reshape(B, T // 4, 4, D).mean(2)
  r = relu(project(relu(project(z, mixer.hidden)), mixer.sort))
  r = r[..., : T // 4].transpose(0, 2, 1, 3) / 0.75
  order = np.zeros_like(r)
  for b, n in np.ndindex(B, N):
    if causal:
      for i in range(1, T // 4):
        order[b, n, i, :i] = oracle.softmax(r[b, n, i, :i])
    else:
      order[b, n] = oracle.sinkhorn(r[b, n], 8)
  o = oracle.sinkhorn_attention(
    *heads(mixer, x), order, block_size=4, causal=causal
  )
  check(mixer, x, o)


@pytest.mark.parametrize('causal', [True, False])
def test_seer(causal):
  mixer = build('seer', causal, num_kv_heads=1, block_size=4, top_k=2)
  x = inputs()
  query, key, value = heads(mixer, x)
  blocks = key.reshape(B, T // 4, 4, 1, H)
  pooled = np.concatenate([blocks.max(2), blocks.min(2), blocks.mean(2)], -1)
  starts, places, plain = np.arange(0, T, 4), np.arange(T), query
  if not causal:
    plain = query.reshape(B, T // 4, 4, N, H).mean(2)
    places = starts
  gate_query, gate_key = (
    rotate(np.einsum('btkh,khe->btke', a, w[...]), at)
    for a, w, at in (
      (plain.reshape(B, -1, 1, N * H), mixer.gate_query, places),
      (pooled, mixer.gate_key, starts),
    )
  )
  if not causal:
    gate_query = np.repeat(gate_query, 4, 1)
  lists = oracle.seer_lists(
    gate_query, gate_key, T, block_size=4, top_k=2, causal=causal, N=N
  )
  query, key = (rotate(a, np.arange(T)) for a in (query, key))
  check(mixer, x, oracle.chosen(query, key, value, lists, causal=causal))


@pytest.mark.parametrize(
  'grid, cube, home',
  [
    ((T,), (8,), [t // 8 for t in range(T)]),
    ((2, 5, 2), (2, 2, 2), [y // 2 for _, y, _ in np.ndindex(2, 5, 2)]),
  ],
)
def test_vsa(grid, cube, home):
  mixer = build('vsa', False, position='none', cube=cube, top_k=2)
  x = inputs()
  gates = (project(x, p) for p in (mixer.coarse_gate, mixer.fine_gate))
  home = np.array(home)
  o = oracle.vsa(*heads(mixer, x), *gates, home=home, top_k=2)
  check(mixer, x, o, grid)


def test_vsa_has_a_grid_of_its_axes():
  mixer = build('vsa', False, cube=(2, 2))
  assert isinstance(mixer, OnGrid)
  mixer.check_grid((4, 5))
  with pytest.raises(ConfigError, match=r'cube=\(2, 2\) has 2 axes.* \(20,\)'):
    mixer.check_grid((20,))
  with pytest.raises(ConfigError, match=r'cube=\(2, 2\) has 2 axes'):
    run(mixer, inputs(), (2, 5, 2))
  with pytest.raises(ConfigError, match='vsa .* a sequence has none'):
    run(mixer, inputs())
  with pytest.raises(ConfigError, match='the grid has 18 cells but T = 20'):
    run(mixer, inputs(), (2, 9))


def test_dsa():
  mixer = build('dsa', position='none', top_k=4, index_heads=3, index_dim=8)
  x = inputs()
  a, b, w = (
    project(x, p)
    for p in (mixer.index_query, mixer.index_key, mixer.index_weight)
  )
  b = b - b.mean(-1, keepdims=True)
  b = b / np.sqrt((b**2).mean(-1, keepdims=True) + 1e-6)
  b = b * mixer.index_norm.scale[...] + mixer.index_norm.bias[...]
  # The first half of the channels is rotated.
  a, b = (
    np.concatenate([rotate(y[..., :4], np.arange(T)), y[..., 4:]], -1)
    for y in (a, b[:, :, None])
  )
  scores = oracle.index_scores(a, b[:, :, 0], w / np.sqrt(24))
  lists = oracle.top_tokens(
    np.repeat(scores[:, :, None], N, 2), top_k=4, causal=True
  )
  check(mixer, x, oracle.chosen(*heads(mixer, x), lists, causal=True))


def test_hash():
  mixer = build('hash', position='none', top_k=4, num_bits=40)
  x = inputs()
  query, key, value = heads(mixer, x)

  def bits(y, mlp):
    for i, matrix in enumerate(mlp.matrices):
      y = oracle.silu(y) if i else y
      y = np.einsum('btnh,nhl->btnl', y, matrix[...])
    return np.where(y > 0, 1, -1)

  agree = np.einsum(
    'btnl,bsnl->btns', bits(query, mixer.query_bits), bits(key, mixer.key_bits)
  )
  lists = oracle.top_tokens(agree, top_k=4, causal=True)
  check(mixer, x, oracle.chosen(query, key, value, lists, causal=True))


def test_attached_losses():
  rng = np.random.default_rng(0)
  y, weight = rng.standard_normal((2, 1, 5, 3)).astype(np.float32)
  weight[:, 3:] = 0  # tokens that nothing reads
  slope = rng.standard_normal((1, 5)).astype(np.float32)

  def f(y, z):
    return jnp.sum(attach(y, slope * z) * weight)

  value, (dy, dz) = jax.value_and_grad(f, (0, 1))(y, jnp.float32(2))
  np.testing.assert_allclose(value, np.sum(y * weight), rtol=1e-6)
  np.testing.assert_array_equal(dy, weight)
  np.testing.assert_allclose(dz, slope[:, :3].sum(), rtol=1e-6)


CHOOSERS = {
  'dsa': ('index', dict(top_k=6, index_heads=3, index_dim=8)),
  'hash': ('bits', dict(top_k=6)),
  'seer': ('gate', dict(block_size=2, top_k=4)),
  'routing': ('centroids', dict(num_clusters=3, cluster_size=4)),
}


@pytest.mark.parametrize('name', sorted(CHOOSERS))
def test_what_chooses_learns_from_its_own_loss(name, monkeypatch):
  """And from no other; the rest learns from the model's loss alone."""
  part, options = CHOOSERS[name]
  module = importlib.import_module(
    f'efficient_attn.layers.mixers.routed.{name}'
  )
  mixer, x = build(name, **options), inputs()
  graphdef, params = nnx.split(mixer)
  losses = []

  def spy(y, loss):
    losses.append(jnp.mean(loss))
    return attach(y, loss)

  monkeypatch.setattr(module, 'attach', spy)

  def objective(params, scale):
    losses.clear()
    y, _ = nnx.merge(graphdef, params)(x)
    return scale * jnp.sum(y * x), losses[0]

  gradient = jax.jit(jax.grad(objective, has_aux=True))

  def chooses(path):
    return any(part in str(key) for key in path)

  (first, _), (second, _) = (gradient(params, scale) for scale in (1.0, 2.0))
  found = jax.tree_util.tree_leaves_with_path(first)
  assert any(chooses(path) for path, _ in found)
  for (path, g), h in zip(found, jax.tree.leaves(second), strict=True):
    assert np.abs(g).max() > 1e-6, path
    factor = 1 if chooses(path) else 2
    np.testing.assert_allclose(h, factor * g, rtol=1e-4, atol=1e-6)

  history = []
  for _ in range(40):
    grads, loss = gradient(params, 1.0)
    params = jax.tree_util.tree_map_with_path(
      lambda path, p, g: p - 1e-2 * g * chooses(path), params, grads
    )
    history.append(loss)
  chex.assert_tree_all_finite(history)
  assert np.mean(history[-5:]) < 0.9 * history[0], history


@pytest.mark.parametrize('name', ['hash', 'nsa', 'seer'])
def test_grouped_heads_decode(name):
  """Two query heads share a key head, and what chooses is shared or not."""
  small = dict(block_size=4, top_k=3, compress_size=4, compress_stride=2)
  options = {
    'hash': dict(top_k=5),
    'nsa': small | dict(window=5),
    'seer': dict(block_size=4, top_k=2),
  }
  mixer, x = build(name, num_kv_heads=1, **options[name]), inputs()

  def step(cache, token):
    y, cache = mixer(token[:, None], cache=cache)
    return cache, y[:, 0]

  @jax.jit
  def decode(x):
    cache = mixer.init_cache(B, T, x.dtype)
    return jax.lax.scan(step, cache, x.swapaxes(0, 1))[1].swapaxes(0, 1)

  np.testing.assert_allclose(decode(x), run(mixer, x), atol=1e-5)


def test_wrong_options():
  with pytest.raises(ConfigError, match='must be even'):
    build('reformer', num_buckets=7)
  with pytest.raises(ConfigError, match='does not divide num_heads=2'):
    build('moba', num_kv_heads=3)
  with pytest.raises(ConfigError, match="did you mean 'rotary'"):
    build('moba', position='rotarry')
  with pytest.raises(ValueError, match='multiple of compress_stride'):
    build('nsa', block_size=24)
  with pytest.raises(ValueError, match='more than max_blocks=4'):
    run(build('sinkhorn', block_size=4, max_blocks=4), inputs())
  with pytest.raises(ValueError, match='does not divide S = 20'):
    run(build('sinkhorn', False, block_size=8), inputs())
