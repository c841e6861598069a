"""What the methods that choose their keys choose by, and what it costs."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from efficient_attn.models.cost import flops, largest_array
from efficient_attn.ops.routed import lsh_attention as lsh
from efficient_attn.ops.routed import nsa, seer, vsa
from efficient_attn.ops.routed.clustered_attention import (
  clustered_attention,
  hamming_clusters,
)
from efficient_attn.ops.routed.dsa import dsa_attention
from efficient_attn.ops.routed.hash_attention import (
  hash_attention,
  pack,
  signs,
  unpack,
)
from efficient_attn.ops.routed.moba import moba_attention
from efficient_attn.ops.routed.routing_attention import (
  clustering_loss,
  nearest,
  normalize,
)
from efficient_attn.ops.routed.sinkhorn_attention import (
  earlier,
  sinkhorn,
  sinkhorn_attention,
)
from efficient_attn.ops.softmax.attention import attention
from tests.ops.routed_cases import (
  BLOCK,
  CASES,
  SAME,
  B,
  H,
  K,
  N,
  bucket_ids,
  make,
  to_jax,
)
from tests.optimized import optimized
from tests.oracles import routed as oracle
from tests.oracles import routed_clusters as clusters


def close(x, y, tolerance=1e-12):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def test_losses_of_what_chooses():
  """The divergences, and that they train what chooses and nothing else."""
  rng = np.random.default_rng(1)
  cases = {name: CASES[name] for name in ('dsa', 'hash')}
  arrays = {name: make(case) for name, case in cases.items()}
  weights = {
    name: rng.standard_normal((B, 21, 1 if name == 'dsa' else N))
    for name in cases
  }

  def losses(arrays):
    a = arrays['hash']
    bits = {n: signs(a[n]) for n in ('query_signs', 'key_signs')}
    return {
      'dsa': dsa_attention(**arrays['dsa'], top_k=5)[1],
      'hash': hash_attention(**a | bits, top_k=5)[1],
    }

  @jax.jit
  def run(arrays):
    out, pull = jax.vjp(losses, arrays)
    return out, pull(to_jax(weights))[0]

  def expected(a):
    scores = oracle.index_scores(
      a['index_query'], a['index_key'], a['index_weights']
    )
    lists = oracle.top_tokens(
      np.repeat(scores[:, :, None], N, 2), top_k=5, causal=True
    )
    return oracle.choice_loss(a['query'], a['key'], lists, scores)

  with jax.enable_x64(True):
    out, gradients = run(to_jax(arrays))
  close(out['dsa'][..., 0], expected(arrays['dsa']))
  learning = {'index_query', 'index_key', 'index_weights'}
  step = {
    n: 1e-6 * rng.standard_normal(x.shape) * (n in learning)
    for n, x in arrays['dsa'].items()
  }
  ends = [
    np.vdot(
      weights['dsa'][..., 0],
      expected({n: x + s * step[n] for n, x in arrays['dsa'].items()}),
    )
    for s in (1, -1)
  ]
  slope = sum(np.vdot(gradients['dsa'][n], step[n]) for n in step)
  np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2, rtol=1e-6)
  learning |= {'query_signs', 'key_signs'}
  for a in gradients.values():
    for n, gradient in a.items():
      assert np.any(gradient) == (n in learning), n
  np.testing.assert_array_less(-1e-12, np.asarray(out['hash']))


def test_seer_learns_from_the_weight_of_blocks():
  case = CASES['seer_encoder']
  a = make(case)
  gate_key = np.random.default_rng(8).standard_normal((B, 6, K, 3))

  @jax.jit
  def run(a, gate_key):
    return seer.seer_attention(
      **a, gate_key=gate_key, block_size=BLOCK, top_k=6, causal=False
    )[1]

  with jax.enable_x64(True):
    loss = run(to_jax(a), jnp.asarray(gate_key))
  for b, t, k in np.ndindex(B, 21, K):
    p = np.zeros(6)
    for n in range(k * 2, k * 2 + 2):
      weights = oracle.softmax(a['key'][b, :, k] @ a['query'][b, t, n] / H**0.5)
      p += np.add.reduceat(weights, range(0, 21, BLOCK)) / 2
    q = oracle.softmax(gate_key[b, :, k] @ a['gate_query'][b, t, k] / 3**0.5)
    close(loss[b, t, k], np.sum(p * np.log(p / q)))


def test_pools_of_blocks():
  key = np.random.default_rng(0).standard_normal((1, 10, 1, 2))
  found = jax.jit(lambda key: seer.pools(key, 4))(key.astype(np.float32))
  for i, block in enumerate(oracle.blocks_of(10, 4)):
    x = key[0, block, 0]
    expected = np.concatenate([x.max(0), x.min(0), x.mean(0)])
    close(found[0, i, 0], expected, 1e-6)


def test_bits_of_signs():
  x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
  words = optimized(pack)(x)
  assert words.shape == (3, 2) and words.dtype == jnp.uint32
  found = optimized(lambda words: unpack(words, 40, jnp.float32))(words)
  np.testing.assert_array_equal(found, optimized(signs)(x))
  np.testing.assert_array_equal(found, np.where(x > 0, 1, -1))


def test_hash_buckets_and_the_cost_of_hashing():
  """One factor costs T^2 when there are 2 T / chunk buckets, two T^1.5."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((B, 9, N, H))
  rotations = [rng.standard_normal((N, 2, H, c)) for c in (1, 3)]

  @jax.jit
  def run(x, rotations):
    return [lsh.lsh_buckets(x, rotations[i:]) for i in range(3)]

  with jax.enable_x64(True):
    found = run(x, rotations)
  for i in range(2):
    expected = clusters.hash_buckets(x, rotations[i:])
    np.testing.assert_array_equal(found[i], expected)
  np.testing.assert_array_equal(found[2], 0)

  def cost(T, factors):
    shapes = [(N, 1, H, factor // 2) for factor in factors]
    arrays = [jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes]
    x = jax.ShapeDtypeStruct((1, T, N, H), 'float32')
    return flops(lsh.lsh_buckets, x, arrays)

  lengths = [2**10, 2**12, 2**14]
  slope = np.diff(np.log2([cost(T, [2 * T // 64]) for T in lengths])) / 2
  close(slope, 2)
  halves = {T: 2 ** int(np.log2(2 * T / 64) // 2) for T in lengths}
  slope = np.diff(
    np.log2([cost(T, [halves[T], 2 * T // 64 // halves[T]]) for T in lengths])
  )
  np.testing.assert_array_less(slope / 2, 1.6)


def test_clusters_and_the_bound_of_their_weights():
  """Weights differ by at most |q_i - q^c| |K| / sqrt(H), and never more."""
  rng = np.random.default_rng(0)
  T, C = 30, 5
  query = rng.standard_normal((B, T, N, H))
  projections = rng.standard_normal((N, H, 16))
  key = rng.standard_normal((B, T, N, H))

  @jax.jit
  def run(query, key, projections):
    ids = hamming_clusters(query, projections, num_clusters=C, iterations=3)
    eye = jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, N, T))
    return ids, clustered_attention(query, key, eye, ids, num_clusters=C)

  with jax.enable_x64(True):
    ids, weights = map(np.asarray, run(query, key, projections))
  np.testing.assert_array_equal(
    ids, clusters.lloyd(query, projections, num_clusters=C, iterations=3)
  )
  ratios = []
  for b, n in np.ndindex(B, N):
    for t in range(T):
      exact = oracle.softmax(key[b, :, n] @ query[b, t, n] / H**0.5)
      same = ids[b, :, n] == ids[b, t, n]
      distance = np.linalg.norm(query[b, t, n] - query[b, same, n].mean(0))
      bound = distance * np.linalg.norm(key[b, :, n], 2) / H**0.5
      error = np.linalg.norm(weights[b, t, n] - exact)
      assert error <= bound + 1e-12
      ratios.append(error / bound if bound else 0)
  assert 0.01 < max(ratios) < 1  # neither trivial nor tight


def test_routing_of_tokens():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((B, 7, N, H))
  mu = rng.standard_normal((N, 3, H))

  @jax.jit
  def run(x, mu):
    loss, pull = jax.vjp(clustering_loss, x, mu)
    return normalize(x), nearest(x, mu), loss, *pull(jnp.ones_like(loss))

  with jax.enable_x64(True):
    normal, ids, loss, dx, dmu = run(x, mu)
  close(normal, clusters.routing_normalize(x))
  expected = np.zeros_like(mu)
  for b, t, n in np.ndindex(B, 7, N):
    c = np.argmax(mu[n] @ x[b, t, n])
    assert ids[b, t, n] == c
    close(loss[b, t, n], ((x[b, t, n] - mu[n, c]) ** 2).sum() / 2)
    expected[n, c] += mu[n, c] - x[b, t, n]
  close(dmu, expected)
  np.testing.assert_array_equal(dx, 0)


def test_orders_of_blocks():
  logits = np.random.default_rng(0).standard_normal((2, 5, 5))

  @jax.jit
  def run(logits, first):
    return sinkhorn(logits, 20), earlier(logits[:, :2], first)

  with jax.enable_x64(True):
    p, rows = map(np.asarray, run(logits, jnp.int32(2)))
  close(p, oracle.sinkhorn(logits, 20))
  close(p.sum(-1), 1, 1e-4)  # doubly stochastic
  close(p.sum(-2), 1)
  for b, i in np.ndindex(2, 2):
    close(rows[b, i, : 2 + i], oracle.softmax(logits[b, i, : 2 + i]))
  np.testing.assert_array_equal(rows[:, 0, 2:], 0)
  np.testing.assert_array_equal(rows[:, 1, 3:], 0)


SHAPES = dict(H=64, N=2)


def cost_of(name, T):
  """FLOPs and the largest array of a training pass at length T."""
  N, H = SHAPES['N'], SHAPES['H']
  x = jax.ShapeDtypeStruct((1, T, N, H), 'float32')
  pair = x, x
  ids = jax.ShapeDtypeStruct((1, T, N, 2), 'int32')
  gates = jax.ShapeDtypeStruct((1, T, N, 3), 'float32')
  sizes = nsa.Sizes(32, 16, 64, 16, 512)
  short = tuple(
    jax.ShapeDtypeStruct((1, T // 16, N, H), 'float32') for _ in range(2)
  )
  calls = {
    'moba': (lambda *a: moba_attention(*a, block_size=128, top_k=3), x, x, x),
    'nsa': (
      lambda *a: nsa.nsa_attention(*a, sizes=sizes),
      *(x, x, short, pair, pair, gates),
    ),
    'reformer': (
      lambda *a: lsh.lsh_attention(*a, num_buckets=T // 32, chunk_size=64),
      *(x, x, x, ids),
    ),
  }
  op, *arrays = calls[name]

  def train(*arrays):
    out, pull = jax.vjp(op, *arrays)
    return pull(out)

  return flops(train, *arrays), largest_array(train, *arrays)


@pytest.mark.parametrize('name', ['moba', 'nsa', 'reformer'])
def test_cost_grows_as_claimed(name):
  """In proportion to T but for the scores of blocks, which are small."""
  time, memory = np.log2(np.divide(cost_of(name, 2**14), cost_of(name, 2**10)))
  assert 4 <= time <= 4 * 1.2
  assert memory <= 4 * 1.01


@pytest.fixture
def unchecked():
  """Without annotations in the way of the errors that users see."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_calls(unchecked):
  rng = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(rng.standard_normal((B, 8, *s)), jnp.float32)
    for s in SAME.values()
  )
  qkv = query, key, value
  with pytest.raises(ValueError, match='top_k is 0'):
    moba_attention(*qkv, block_size=4, top_k=0)
  with pytest.raises(ValueError, match='block_size is 0'):
    moba_attention(*qkv, block_size=0, top_k=1)
  with pytest.raises(ValueError, match='must be at least 3'):
    nsa.check_sizes(nsa.Sizes(4, 2, 4, 2, 5))
  with pytest.raises(ValueError, match='multiple of compress_stride = 2'):
    nsa.check_sizes(nsa.Sizes(3, 2, 4, 4, 5))
  with pytest.raises(ValueError, match='window is 0'):
    nsa.check_sizes(nsa.Sizes(4, 2, 4, 4, 0))
  ids = jnp.asarray(bucket_ids(8, 2))
  with pytest.raises(ValueError, match='does not divide T = 8'):
    lsh.sorted_chunk_attention(*qkv, ids, num_buckets=4, chunk_size=3)
  with pytest.raises(ValueError, match='chunk_size is 0'):
    lsh.lsh_attention(*qkv, ids, num_buckets=4, chunk_size=0)
  with pytest.raises(ValueError, match='does not divide S = 8'):
    order = jnp.ones((B, N, 3, 3))
    sinkhorn_attention(*qkv, order, block_size=3, causal=False)
  with pytest.raises(ValueError, match='2 columns but S = 8'):
    sinkhorn_attention(*qkv, jnp.ones((B, N, 2, 2)), block_size=3)
  with pytest.raises(ValueError, match='the grid has 9 cells'):
    cubes = vsa.cut((3, 3), (2, 2))
    vsa.vsa_attention(*qkv, value, value, cubes=cubes, top_k=1)
  with pytest.raises(ValueError, match='as many axes'):
    vsa.cut((3, 3), (2, 2, 2))
  with pytest.raises(ValueError, match='top_k is 0'):
    dsa_attention(*qkv, query, query[:, :, 0], query[..., 0], top_k=0)


@pytest.mark.in_turn
def test_hash_attention_of_an_encoder_in_chunks():
  """With every key chosen it is attention, for many queries and few keys."""
  rng = np.random.default_rng(2)
  T, S, L = 300, 200, 16

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  q, k, v = draw(2, T, 8, 16), draw(2, S, 4, 16), draw(2, S, 4, 16)
  bits = signs(draw(2, T, 8, L)), signs(draw(2, S, 4, L))
  out, _ = hash_attention(q, k, v, *bits, top_k=S, causal=False)
  np.testing.assert_allclose(out, attention(q, k, v), atol=1e-5)
