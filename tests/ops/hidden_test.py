"""What a mask hides from every query may hold anything, NaN included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax.attention_blockwise import attention_blockwise
from efficient_attn.ops.softmax.attention_merge import split_attention
from efficient_attn.ops.softmax.attention_reference import attention_reference
from efficient_attn.ops.softmax.normalizers import (
  entmax,
  hard,
  normalized_attention,
  softmax,
)

B, T, S, N, K, H = 2, 20, 26, 4, 2, 8
ANYTHING = (np.nan, np.inf, -np.inf, 3e38)


def normalized(normalize):
  return lambda *heads, mask, **_: normalized_attention(
    *heads, mask=mask, normalize=normalize
  )


def sparse(z):
  return entmax(z, jnp.full(z.shape[:-1], 1.5))


OPS = {
  'reference': lambda *a, **o: attention_reference(*a, **o)[0],
  'blockwise': lambda *a, **o: attention_blockwise(
    *a, block_q=8, block_k=8, **o
  )[0],
  'split': lambda *a, mask, logits_soft_cap, **_: split_attention(
    *a, mask=mask, logits_soft_cap=logits_soft_cap, num_splits=3
  )[0],
  'softmax': normalized(softmax),
  'hard': normalized(hard),
  'entmax': normalized(sparse),
}


def ids(*runs):
  return jnp.repeat(jnp.asarray([r[0] for r in runs]), np.array(runs)[:, 1])


# Queries and keys of ids 8 and 9 have no partner.
QUERY_IDS = ids((8, 3), (1, 7), (2, 8), (8, 2))
KEY_IDS = ids((1, 6), (9, 9), (2, 7), (9, 4))
SEGMENTS = masks.Segments(QUERY_IDS[None], KEY_IDS[None])
DENSE = np.random.default_rng(5).random((1, N, T, S)) < 0.5
DENSE[..., 4:9] = False
DENSE[:, :, 11:13] = False
# Mask, and which queries and keys it leaves without a partner.
MASKS = {
  'segments': (SEGMENTS, QUERY_IDS == 8, KEY_IDS == 9),
  'causal': (masks.Causal(), np.zeros(T, bool), np.arange(S) >= T),
  'window': (
    masks.Causal(-3) & masks.Window(6, 0),
    np.arange(T) < 3,
    np.arange(S) >= T - 3,
  ),
  'dense': (
    masks.Dense(DENSE),
    ~DENSE.any((0, 1, 3)),
    ~DENSE.any((0, 1, 2)),
  ),
}


@functools.partial(jax.jit, static_argnames=('name', 'kind'))
def results(heads, bias, name, kind):
  """The output and the gradients of a sum that leaves out no row."""
  mask = MASKS[kind][0]

  def call(heads, bias):
    out = OPS[name](
      *heads, mask=mask, bias=scores.Dense(bias), logits_soft_cap=20.0
    )
    return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

  grads, out = jax.grad(call, (0, 1), has_aux=True)(heads, bias)
  return out, grads


def heads():
  rng = np.random.default_rng(0)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  q, k, v = (rng.standard_normal(s).astype(np.float32) for s in shapes)
  return (q, k, v), rng.standard_normal((1, N, T, S)).astype(np.float32)


@pytest.mark.parametrize('kind', MASKS)
@pytest.mark.parametrize('name', OPS)
def test_hidden_tokens_may_hold_anything(name, kind):
  (q, k, v), bias = heads()
  _, blind, hidden = map(np.asarray, (0, *MASKS[kind][1:]))

  def filled(x, where, anything):
    return np.where(where[:, None, None], np.float32(anything), x)

  def run(anything):
    with np.errstate(invalid='ignore'):
      arrays = (
        filled(q, blind, anything),
        filled(k, hidden, anything),
        filled(v, hidden, anything),
      )
    return results(arrays, bias, name, kind)

  expected = run(0)
  assert np.isfinite(
    jnp.concatenate([x.ravel() for x in jax.tree.leaves(expected)])
  ).all()
  for anything in ANYTHING:
    found = run(anything)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('name', ['reference', 'blockwise'])
def test_finite_numbers_of_the_future_do_not_reach_a_row(name):
  rng = np.random.default_rng(1)
  q, k, v = rng.standard_normal((3, 1, T, 2, H)).astype(np.float32)
  early = np.arange(T) < 11

  @jax.jit
  def run(*heads):
    def call(*heads):
      out = OPS[name](*heads, mask=masks.Causal(), logits_soft_cap=None)[
        :, early
      ]
      return jnp.sum(out**2), out

    grads, out = jax.grad(call, (0, 1, 2), has_aux=True)(*heads)
    return out, [g[:, early] for g in grads]

  expected = run(q, k, v)
  far = [np.where(early[:, None, None], x, 1e18 * x) for x in (q, k, v)]
  jax.tree.map(np.testing.assert_array_equal, run(*far), expected)


def test_nan_of_the_future_stays_behind_the_border_of_a_tile():
  rng = np.random.default_rng(1)
  q, k, v = rng.standard_normal((3, 1, 24, 2, H)).astype(np.float32)
  late = (np.arange(24) >= 16)[:, None, None]
  call = jax.jit(lambda *heads: OPS['blockwise'](*heads, mask=masks.Causal()))
  expected = call(q, k, v)
  found = call(*(np.where(late, np.nan, x) for x in (q, k, v)))
  np.testing.assert_array_equal(found[:, :16], expected[:, :16])


@jax.jit
def one_query(q, k, v, offset):
  """A step of decoding, whose keys past the offset are not there yet."""

  def call(q, k, v):
    out, _ = attention_reference(q, k, v, mask=masks.Causal(offset))
    return jnp.sum(out**2), out

  grads, out = jax.grad(call, (0, 1, 2), has_aux=True)(q, k, v)
  return out, grads


def test_the_rest_of_a_cache_may_hold_anything():
  (q, k, v), _ = heads()
  hidden = np.arange(S) > 11
  expected = one_query(q[:, :1], k, v, 11)
  np.testing.assert_array_equal(expected[1][1][:, hidden], 0)
  for anything in ANYTHING:
    filled = (np.where(hidden[:, None, None], anything, x) for x in (k, v))
    found = one_query(q[:, :1], *filled, 11)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
