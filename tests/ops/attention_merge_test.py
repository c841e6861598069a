"""Pieces of the keys merge to the whole, however they are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import (
  attention,
  attention_with_stats,
)
from efficient_attn.ops.softmax.attention_merge import (
  merge_attention,
  split_attention,
)
from efficient_attn.ops.softmax.stats import Stats
from tests.ops.attention_cases import make_arrays
from tests.oracles import attention as oracle

B, T, S, N, H = 2, 3, 11, 4, 4
LENGTHS = np.array([0, 8], np.int32)
how = dict(scale=0.7, logits_soft_cap=1.5)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def admitted(kind):
  """The keys that each case of `masks_of` admits."""
  t, s = np.arange(T)[:, None], np.arange(S)
  seen = np.ones((B, N, T, S), bool)
  if kind == 'causal':
    seen &= (s <= t + 4) & (s < LENGTHS[:, None, None, None])
  return seen


def options_of(kind):
  if kind == 'all':
    return {}
  return dict(lengths=jnp.asarray(LENGTHS), mask=masks.Causal(4))


@functools.cache
def weights():
  rng = np.random.default_rng(3)
  return rng.standard_normal((B, T, N, 3)), rng.standard_normal((B, T, N))


def loss(out, lse):
  finite = jnp.where(lse == -jnp.inf, 0, lse)
  return jnp.sum(weights()[0] * out) + jnp.sum(weights()[1] * finite)


@pytest.mark.parametrize('kind', ['all', 'causal'])
def test_every_split_is_exact(x64, kind):
  arrays = make_arrays(T, S, dtype=np.float64)
  seen = admitted(kind)

  def whole(*arrays):
    results = attention(*arrays, mask=masks.Dense(seen), return_lse=True, **how)
    return loss(*results), results

  def split(num_splits, *arrays):
    out, stats = split_attention(
      *arrays, num_splits=num_splits, **options_of(kind), **how
    )
    return loss(out, stats.lse), (out, stats.lse)

  def run(*arrays):
    grad = functools.partial(
      jax.value_and_grad, argnums=(0, 1, 2), has_aux=True
    )
    return grad(whole)(*arrays), [
      grad(functools.partial(split, j))(*arrays) for j in range(1, S + 1)
    ]

  expected, found = jax.jit(run)(*arrays)
  cap = dict(scale=0.7, cap=1.5)
  for x, y in zip(
    expected[0][1], oracle.attention(*arrays, seen, **cap), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
  assert len(found) == S
  for result in found:
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
      result,
      expected,
    )


def test_merge_is_associative_and_takes_sinks(x64):
  q, k, v = make_arrays(T, S, dtype=np.float64)
  sinks = jnp.asarray([0.3, -1.0, 2.0, 0.0])

  def join(*parts):
    return merge_attention(*jax.tree.map(lambda *x: jnp.stack(x), *parts))

  def run(q, k, v):
    parts = [
      attention_with_stats(q, k[:, a:b], v[:, a:b])
      for a, b in ((0, 2), (2, 3), (3, S))
    ]
    sinks_ = jnp.broadcast_to(sinks, (B, T, N))
    sink = jnp.zeros_like(parts[0][0]), Stats(sinks_, jnp.ones_like(sinks_))
    pairs = join(join(sink, parts[2]), join(*parts[:2]))
    return join(sink, *parts), pairs

  everything = np.ones((B, N, T, S), bool)
  expected = oracle.attention(q, k, v, everything, sinks=np.asarray(sinks))
  for out, stats in jax.jit(run)(q, k, v):
    np.testing.assert_allclose(out, expected[0], rtol=1e-12)
    np.testing.assert_allclose(stats.lse, expected[1], rtol=1e-12)


def test_what_lies_past_the_lengths_does_not_matter():
  q, k, v = make_arrays(T, S)
  past = (np.arange(S) >= LENGTHS[:, None])[:, :, None, None]
  op = jax.jit(
    functools.partial(
      split_attention, num_splits=4, lengths=jnp.asarray(LENGTHS)
    )
  )
  out, stats = op(q, k, v)
  again = op(q, jnp.where(past, 1e4, k), jnp.where(past, -7.0, v))
  np.testing.assert_array_equal(out, again[0])
  jax.tree.map(np.testing.assert_array_equal, stats, again[1])
  np.testing.assert_array_equal(out[0], 0)
  np.testing.assert_array_equal(stats.lse[0], -jnp.inf)


def test_bfloat16_error_is_at_most_twice_that_of_the_reference():
  q, k, v = make_arrays(2, 64, H=16, V=16, dtype=jnp.bfloat16)
  exact = [np.asarray(x, np.float64) for x in (q, k, v)]
  wanted, _ = oracle.attention(*exact, np.ones((B, N, 2, 64), bool))
  out, stats = split_attention(q, k, v, num_splits=8)
  assert out.dtype == jnp.bfloat16 and stats.total.dtype == jnp.float32
  plain = attention(q, k, v)
  error = np.abs(np.asarray(out, np.float64) - wanted).max()
  assert error <= 2 * np.abs(np.asarray(plain, np.float64) - wanted).max()


@pytest.mark.parametrize('num_splits', [0, S + 1])
def test_wrong_splits(num_splits):
  with pytest.raises(ValueError, match='between 1 and the S = 11 keys'):
    split_attention(*make_arrays(T, S), num_splits=num_splits)
