"""Attention through a table of pages equals attention over whole arrays."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from efficient_attn.ops.softmax.paged_attention import paged_attention
from tests.oracles import attention as oracle

B, T, N, K, H, V = 4, 2, 4, 2, 4, 3
PAGE, M, P = 3, 4, 10
LENGTHS = np.array([12, 7, 2, 1], np.int32)
# The first two share two pages, as sequences with one prompt do; -1 and 99
# name no page, and stand where nothing reads.
TABLE = np.array(
  [[4, 1, 9, 0], [4, 1, 2, 99], [7, -1, 99, 99], [3, 99, 99, 99]], np.int32
)


def make():
  rng = np.random.default_rng(0)
  shapes = ((B, T, N, H), (P, PAGE, K, H), (P, PAGE, K, V))
  return [rng.standard_normal(shape) for shape in shapes]


@functools.cache
def contiguous():
  """The same sequences, copied out of the pages one token at a time."""
  query, key_pages, value_pages = make()
  key, value = np.zeros((B, M * PAGE, K, H)), np.zeros((B, M * PAGE, K, V))
  admitted = np.zeros((B, N, T, M * PAGE), bool)
  for b in range(B):
    for s in range(LENGTHS[b]):
      key[b, s] = key_pages[TABLE[b, s // PAGE], s % PAGE]
      value[b, s] = value_pages[TABLE[b, s // PAGE], s % PAGE]
    for t in range(T):
      admitted[b, :, t, : max(LENGTHS[b] - T + t + 1, 0)] = True
  return query, key, value, admitted


def test_equals_contiguous():
  with jax.enable_x64(True):
    found = jax.jit(paged_attention)(*make(), TABLE, LENGTHS)
    expected, _ = oracle.attention(*contiguous())
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found[3, 0], 0)  # a query before its sequence

    options = dict(scale=0.3, logits_soft_cap=2.0)
    op = jax.jit(functools.partial(paged_attention, **options))
    found = op(*make(), TABLE, LENGTHS)
    expected, _ = oracle.attention(*contiguous(), scale=0.3, cap=2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_unused_slots_may_hold_anything():
  query, *pages = (jnp.asarray(x, jnp.float32) for x in make())
  used = np.zeros((P, PAGE), bool)
  for b in range(B):
    for s in range(LENGTHS[b]):
      used[TABLE[b, s // PAGE], s % PAGE] = True
  assert not used.all()
  dirty = [jnp.where(used[:, :, None, None], x, jnp.nan) for x in pages]

  def f(query, key_pages, value_pages):
    arrays = query, key_pages, value_pages, *map(jnp.asarray, (TABLE, LENGTHS))
    return paged_attention(*arrays).sum()

  grad = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))
  for x, y in zip(
    jax.tree.leaves(grad(query, *pages)),
    jax.tree.leaves(grad(query, *dirty)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


@pytest.fixture
def unchecked():
  """Our own errors, not those of the annotations that tests check."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_wrong_shapes(unchecked):
  query, key_pages, value_pages = map(jnp.asarray, make())
  table, lengths = jnp.asarray(TABLE), jnp.asarray(LENGTHS)
  with pytest.raises(ValueError, match='for B = 3 sequences'):
    paged_attention(
      query, key_pages, value_pages, jnp.asarray(TABLE[:3]), lengths
    )
  with pytest.raises(ValueError, match='value_pages has'):
    paged_attention(query, key_pages, value_pages[:, :2], table, lengths)
