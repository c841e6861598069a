"""Attention to blocks and tokens of choice, the parts that methods share."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from efficient_attn.models.cost import flops, largest_array
from efficient_attn.ops.routed import selected_blocks, selected_tokens
from efficient_attn.ops.routed.selected_blocks import (
  block_attention,
  causal_bias,
  positions,
  tile_rows,
  top_blocks,
)
from efficient_attn.ops.routed.selected_tiles import deal
from efficient_attn.ops.routed.selected_tokens import token_attention

B, T, S, N, H, V, C = 2, 11, 18, 4, 3, 5, 4
# Kv heads, choices, and whether blocks are lists of tokens.
CASES = [(2, 2, False), (2, 4, True), (1, 1, True), (2, 4, False)]


def close(x, y, tolerance=1e-12):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def make(K, M, lists, seed=0):
  """Arrays, blocks [B, T, M, 3] with some -1, and members or None."""
  rng = np.random.default_rng(seed)
  shapes = dict(query=(T, N, H), key=(S, K, H), value=(S, K, V))
  arrays = {n: rng.standard_normal((B, *s)) for n, s in shapes.items()}
  number = 7 if lists else -(-S // C)
  order = rng.random((B, T, M, number)).argsort(-1)[..., :3]
  blocks = np.where(rng.random(order.shape) < 0.2, -1, order)
  blocks[0, 0] = -1
  members = None
  if lists:  # no token twice in a block, but in several blocks
    members = rng.random((B, M, number, S)).argsort(-1)[..., :C]
    members = np.where(rng.random(members.shape) < 0.2, -1, members)
  ids = rng.integers(0, 3, (B, max(S, T), 2))
  return arrays, blocks.astype(np.int32), members, ids


def reference(arrays, blocks, members, ids, *, weights=None):
  """Output, log denominators of all keys and of each block."""
  q, k, v = (arrays[n] for n in ('query', 'key', 'value'))
  K, M = k.shape[2], blocks.shape[2]
  out, lse = np.zeros((B, T, N, V)), np.full((B, T, N), -np.inf)
  parts = np.full((B, T, N, 3), -np.inf)
  for b, t, n in np.ndindex(B, T, N):
    m, kv = n // (N // M), n // (N // K)
    logits, values = [], []
    for j, i in enumerate(blocks[b, t, m]):
      if i < 0:
        continue
      seen = range(i * C, min(i * C + C, S))
      if members is not None:
        seen = members[b, m, i][members[b, m, i] >= 0]
      # Hidden: more than 6 ahead; of equal ids, a bias.
      seen = [s for s in seen if s <= t + 6]
      found = [
        0.5 * q[b, t, n] @ k[b, s, kv] - 0.3 * (ids[b, t] == ids[b, s]).sum()
        for s in seen
      ]
      if found:
        parts[b, t, n, j] = np.log(np.sum(np.exp(found)))
      logits += found
      values += [v[b, s, kv] for s in seen]
    if logits:
      lse[b, t, n] = np.log(np.sum(np.exp(logits)))
      out[b, t, n] = np.exp(np.array(logits) - lse[b, t, n]) @ np.array(values)
  return out, lse, parts


def bias(query, key):
  (query, query_ids), (key, key_ids) = query, key
  same = -0.3 * (query_ids == key_ids).sum(-1)
  return jnp.where(key <= query + 6, same, -jnp.inf)


@pytest.mark.parametrize('K, M, lists', CASES)
@pytest.mark.parametrize('budget', [1 << 22, 1])
def test_outputs_and_gradients(K, M, lists, budget, monkeypatch):
  """At once, and a few queries and a tile at a time."""
  monkeypatch.setattr(selected_blocks, 'BUDGET', budget)
  monkeypatch.setattr(selected_blocks, 'PAIRS', budget)
  arrays, blocks, members, ids = make(K, M, lists)
  rng = np.random.default_rng(1)
  weights = rng.standard_normal((B, T, N, V)), rng.standard_normal((B, T, N))

  def op(arrays):
    marks = positions(S), jnp.asarray(ids)[:, :S, None]
    found = block_attention(
      **arrays,
      blocks=jnp.asarray(blocks),
      block_size=C,
      members=None if members is None else jnp.asarray(members),
      bias=bias,
      query_marks=(positions(T), jnp.asarray(ids)[:, :T, None]),
      key_marks=marks,
      scale=0.5,
    )
    out, lse, parts = found[0], found[1].lse, found[2].lse
    return (out, jnp.where(lse == -jnp.inf, 0, lse)), (lse, parts)

  @jax.jit
  def run(arrays):
    (out, _), pull, more = jax.vjp(op, arrays, has_aux=True)
    return out, *more, pull(jax.tree.map(jnp.asarray, weights))[0]

  with jax.enable_x64(True):
    *found, gradients = run(jax.tree.map(jnp.asarray, arrays))
  for x, y in zip(found, reference(arrays, blocks, members, ids), strict=True):
    close(x, y)
  np.testing.assert_array_equal(found[0][0, 0], 0)
  step = {n: 1e-5 * rng.standard_normal(x.shape) for n, x in arrays.items()}

  def f(sign):
    moved = {n: x + sign * step[n] for n, x in arrays.items()}
    out, lse, _ = reference(moved, blocks, members, ids)
    lse = np.where(np.isinf(lse), 0, lse)
    return np.vdot(weights[0], out) + np.vdot(weights[1], lse)

  slope = sum(np.vdot(gradients[n], step[n]) for n in arrays)
  np.testing.assert_allclose(slope, (f(1) - f(-1)) / 2, rtol=1e-6)


@pytest.mark.in_turn
def test_vmap_is_a_loop():
  arrays, blocks, *_ = make(2, 2, False)
  other, more, *_ = make(2, 2, False, seed=5)
  x, y = (
    {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()} | {'blocks': i}
    for arrays, i in ((arrays, jnp.asarray(blocks)), (other, jnp.asarray(more)))
  )

  def f(x):
    def loss(floats):
      out, *_ = block_attention(**x | floats, block_size=C)
      return jnp.sum(out**2)

    return jax.value_and_grad(loss)({n: x[n] for n in arrays})

  @jax.jit
  def run(x, y):
    both = jax.tree.map(lambda *a: jnp.stack(a), x, y)
    loop = jax.tree.map(lambda *a: jnp.stack(a), f(x), f(y))
    return jax.vmap(f)(both), loop

  jax.tree.map(lambda x, y: close(x, y, 1e-5), *run(x, y))


def test_half_precision():
  arrays, blocks, *_ = make(2, 2, False)
  op = jax.jit(
    functools.partial(
      block_attention, blocks=jnp.asarray(blocks), block_size=C
    ),
  )
  exact = {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()}
  out, stats, _ = op(**{n: a.astype(jnp.bfloat16) for n, a in exact.items()})
  expected, _, _ = op(**exact)
  assert out.dtype == jnp.bfloat16 and stats.total.dtype == jnp.float32
  close(out.astype(np.float32), expected, 0.03)


def test_dealing():
  """Every thing gets a row of a tile of its kind, in order."""
  rng = np.random.default_rng(0)
  for number, rows, things in ((5, 4, 30), (5, 1, 30), (9, 8, 6), (1, 2, 1)):
    ids = rng.integers(-1, number, things).astype(np.int32)
    count = (things + number * (rows - 1)) // rows
    run = functools.partial(deal, number=number, rows=rows, count=count)
    found = jax.jit(run)(jnp.asarray(ids))
    target, source, owner, first = map(np.asarray, found)
    np.testing.assert_array_equal(target[ids < 0], count * rows)
    np.testing.assert_array_equal(
      np.sort(source[source >= 0]), np.flatnonzero(ids >= 0)
    )
    for kind in range(number):
      found = target[ids == kind]
      np.testing.assert_array_equal(
        found, first[kind] * rows + np.arange(found.size)
      )
      np.testing.assert_array_equal(owner[found // rows], kind)
      np.testing.assert_array_equal(source[found], np.flatnonzero(ids == kind))


def test_top_blocks():
  scores = jnp.array([[1.0, 3.0, 3.0, 2.0, 9.0]])
  allowed = jnp.array([True, True, True, True, False])
  assert top_blocks(scores, allowed, 2).tolist() == [[1, 2]]  # ties: the first
  assert top_blocks(scores, allowed, 9).tolist() == [[1, 2, 3, 0, -1]]
  forced = jnp.arange(5) == 0
  assert top_blocks(scores, allowed, 2, forced=forced).tolist() == [[0, 1]]


def test_tiles_and_cost():
  """Decoding computes what it must, training in proportion to the length."""
  assert tile_rows(pairs=3, number=100, block_size=64) == 1
  assert tile_rows(pairs=64 * 300, number=100, block_size=64) == 64
  assert tile_rows(pairs=64 * 100, number=100, block_size=64) == 32

  def cost(T, S, top_k, C=32):
    arrays = [jax.ShapeDtypeStruct((1, n, 2, 16), 'float32') for n in (T, S, S)]
    blocks = jax.ShapeDtypeStruct((1, T, 2, top_k), 'int32')

    def train(query, key, value, blocks):
      out, pull = jax.vjp(
        lambda *qkv: block_attention(
          *qkv,
          blocks,
          block_size=C,
          bias=causal_bias,
          query_marks=positions(T),
          key_marks=positions(S),
        )[0],
        *(query, key, value),
      )
      return pull(out)

    return np.array([f(train, *arrays, blocks) for f in (flops, largest_array)])

  # One query: top_k blocks, whatever the length, in seven products.
  asked = 7 * 2 * 2 * 3 * 32 * 16
  assert cost(1, 4096, 3)[0] == cost(1, 512, 3)[0] == asked
  # Twice the length, twice the cost, and half as many pairs again at most.
  long, short = cost(2**16, 2**16, 4), cost(2**15, 2**15, 4)
  assert long[0] == pytest.approx(2 * short[0], rel=1e-3)
  asked = 7 * 2 * 2 * 2**16 * 4 * 32 * 16
  assert asked <= long[0] <= 1.5 * asked
  # Memory for the pairs of a part of the queries, padding included.
  assert long[1] <= 1.5 * selected_blocks.PAIRS


def test_tokens_in_chunks(monkeypatch):
  """A chunk at a time gives what all at once does, forward and backward."""
  rng = np.random.default_rng(0)
  arrays = [rng.standard_normal((B, 7, 2, H)) for _ in range(3)]
  table = rng.standard_normal((B, 2, 7, 7))

  @functools.partial(jax.jit, static_argnums=2)
  def run(arrays, table, budget):
    monkeypatch.setattr(selected_tokens, 'BUDGET', budget)

    def f(arrays, table):
      def score(rows):  # [B, C] to [B, 2, C, 7]
        return jax.vmap(lambda x, i: x[:, i])(table, rows)

      rows = jnp.broadcast_to(jnp.arange(7), (B, 7))
      out, loss = token_attention(*arrays, score, rows, top_k=3)
      return jnp.sum(out**2) + jnp.sum(loss**2), (out, loss)

    return jax.value_and_grad(f, (0, 1), has_aux=True)(arrays, table)

  with jax.enable_x64(True):
    args = jax.tree.map(jnp.asarray, (arrays, table))
    jax.tree.map(close, run(*args, 1), run(*args, 1 << 24))


@pytest.fixture
def unchecked():
  """Without annotations in the way of the errors that users see."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_calls(unchecked):
  arrays, blocks, *_ = make(2, 2, False)
  arrays = {n: jnp.asarray(x, jnp.float32) for n, x in arrays.items()}
  blocks = jnp.asarray(blocks)
  with pytest.raises(ValueError, match='blocks has 3 choices'):
    block_attention(**arrays, blocks=jnp.zeros((B, T, 3, 1), int), block_size=C)
  with pytest.raises(ValueError, match='block_size is 0'):
    block_attention(**arrays, blocks=blocks, block_size=0)
