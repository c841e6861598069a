"""Softmax weights and their gradients stay right when logits are large.

The oracle is float64 and starts from the float32 logits, because a bias of -1e9
rounds every score of a row to the same number: what the mask leaves is then a
mean over all keys, whose gradients a lost log(sum) would get wrong.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.routed.selected_blocks import block_attention
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.ops.softmax.attention_merge import split_attention

B, T, N, H = 2, 24, 2, 8
LOWEST = float(np.finfo(np.float32).min)
# What is added to the logits of the keys in front, as a mask of padding does.
BIASES = [-1e4, -1e6, -1e9, -1e30, LOWEST, 1e9]


def arrays(scale=1.0):
  rng = np.random.default_rng(0)
  q, k, v = rng.standard_normal((3, B, T, N, H)).astype(np.float32)
  return scale * q, k, v


def padding(bias):
  """Row 0 has 9 keys of padding in front, which some queries see alone."""
  found = np.zeros((B, 1, 1, T), np.float32)
  found[0, ..., :9] = bias
  return found


def blocks(q, k, v, bias):
  """Every block of 8 keys, by `selected_blocks`: none is left out."""
  chosen = jnp.broadcast_to(jnp.arange(3), (B, T, N, 3))
  positions = jnp.arange(T)[None, :, None, None]
  marks = jnp.broadcast_to(bias[:, 0, 0, :, None, None], (B, T, N, 1))

  def causal(query, key):
    at, added = key[..., :1], key[..., 1:]
    seen = query >= at
    return jnp.where(seen, added, -jnp.inf)[..., 0]

  at = jnp.broadcast_to(positions, (B, T, N, 1)).astype(jnp.float32)
  out, *_ = block_attention(
    q,
    k,
    v,
    chosen,
    block_size=8,
    bias=causal,
    query_marks=at,
    key_marks=jnp.concatenate([at, marks], -1),
  )
  return out


def op(name):
  if name == 'selected_blocks':
    return blocks
  return lambda q, k, v, bias: attention(
    q, k, v, mask=masks.Causal(), bias=bias, implementation=name
  )


def float32_logits(q, k, bias):
  """The masked logits as float32 has them, [B, N, T, S]."""
  seen = np.tri(T, dtype=bool)

  @jax.jit
  def scores(q, k):
    return H**-0.5 * jnp.einsum('btnh,bsnh->bnts', q, k)

  s = np.asarray(scores(q, k)) + bias
  return np.where(seen, s, -np.inf), seen


def oracle(q, k, v, bias, weight):
  """Output and gradients of sum(weight * output), float64.

  With each stands the largest sum of absolute values that it is made of, to
  which errors are compared: gradients of tied keys cancel to zero.
  """
  s, _ = float32_logits(q, k, bias)
  s = s.astype(np.float64)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  v, weight = v.astype(np.float64), weight.astype(np.float64)
  dp = np.einsum('btnv,bsnv->bnts', weight, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * H**-0.5
  parts = p * (abs(dp) + (p * abs(dp)).sum(-1, keepdims=True)) * H**-0.5
  q, k = q.astype(np.float64), k.astype(np.float64)

  def pair(equation, *factors):
    sizes = [parts if f is ds else abs(f) for f in factors]
    return np.einsum(equation, *factors), np.einsum(equation, *sizes).max()

  return (
    pair('bnts,bsnv->btnv', p, v),
    pair('bnts,bsnh->btnh', ds, k),
    pair('bnts,btnh->bsnh', ds, q),
    pair('bnts,btnv->bsnv', p, weight),
  )


def found(name, q, k, v, bias, weight):
  @jax.jit
  def run(q, k, v, bias):
    out, pull = jax.vjp(lambda *x: op(name)(*x, bias), q, k, v)
    return out, *pull(weight)

  return run(*map(jnp.asarray, (q, k, v, bias)))


def assert_right(name, q, k, v, bias):
  weight = np.random.default_rng(1).standard_normal(v.shape).astype(np.float32)
  wanted = oracle(q, k, v, bias, weight)
  got = found(name, q, k, v, bias, weight)
  names = 'out', 'dq', 'dk', 'dv'
  for what, x, (y, size) in zip(names, got, wanted, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * size, err_msg=what)


NAMES = ['reference', 'blockwise', 'selected_blocks']


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bias', BIASES)
def test_finite_masks(name, bias):
  assert_right(name, *arrays(), padding(bias))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('size', [1e4, 1e6, 1e7, 1e9, 1e15])
def test_large_scores(name, size):
  q, k, v = arrays(size)
  k[:, 1::2] = k[:, ::2]  # ties, so that more than one key counts
  assert_right(name, q, k, v, padding(0.0))


def test_pieces_merge_by_how_many_keys_they_have():
  """One key in the first piece, eleven like it in the others."""
  q = jnp.full((1, 1, 1, 1), 1e9)
  k = jnp.ones((1, 12, 1, 1))
  v = jnp.arange(12.0).reshape(1, 12, 1, 1)
  for splits in (1, 2, 5, 12):
    out, _ = jax.jit(functools.partial(split_attention, num_splits=splits))(
      q, k, v
    )
    np.testing.assert_allclose(out, 5.5, rtol=1e-6)
