"""The kernel for few queries, interpreted, and which calls it serves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.layers.cache import token_cache
from efficient_attn.layers.context import Context
from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax import attention_decode
from efficient_attn.ops.softmax.attention import attention, explain_attention
from efficient_attn.ops.softmax.paged_attention import (
  explain_paged_attention,
  paged_attention,
)
from tests.ops.attention_cases import make_arrays
from tests.ops.attention_kernels_test import errors, reference

KERNEL = 'pallas_tpu'
RNG = np.random.default_rng(0)
ENDS = jnp.asarray([599, 130])
STARTS = jnp.asarray([0, 5])
DENSE = RNG.random((2, 4, 1, 600)) < 0.3
NEAR = RNG.standard_normal((1, 4, 1, 600))
GATES = -np.abs(RNG.standard_normal((2, 600, 4)))


def begun():
  """A causal mask of rows that start behind padding."""
  return masks.Causal(ENDS) & masks.At(
    ~masks.Causal(-1), STARTS[:, None], jnp.arange(600)[None]
  )


# name: (T, S, N, K, mask, options)
CASES = {
  'all': (1, 600, 4, 2, lambda: None, {}),
  'cursor': (1, 600, 4, 2, lambda: masks.Causal(jnp.int32(300)), {}),
  'few': (1, 3, 4, 4, lambda: masks.Causal(jnp.int32(1)), {}),
  'rows': (1, 600, 4, 1, begun, {}),
  'several': (5, 600, 6, 3, lambda: masks.Causal(ENDS - 4), {}),
  'window': (3, 600, 4, 2, lambda: masks.Window(40, 0, jnp.int32(500)), {}),
  'heads': (1, 600, 4, 2, lambda: masks.Dense(DENSE), {}),
  'nothing': (1, 600, 4, 2, lambda: masks.Causal(jnp.int32(-1)), {}),
  'extras': (
    1, 600, 4, 2, begun,
    dict(
      bias=lambda: scores.Alibi(jnp.asarray([0.1, 0.0, 0.3, 0.01]), ENDS)
      + scores.Dense(jnp.asarray(NEAR)),
      sinks=lambda: jnp.asarray([0.5, -1.0, 2.0, 0.0]),
      logits_soft_cap=lambda: 2.0,
      scale=lambda: jnp.asarray(-0.7),
    ),
  ),
  'forget': (
    2, 600, 4, 2, lambda: masks.Causal(jnp.int32(420)),
    dict(bias=lambda: scores.Forget(jnp.asarray(GATES), jnp.int32(420))),
  ),
}  # fmt: skip


def to_64(x):
  floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
  return jnp.asarray(np.asarray(x, np.float64)) if floating else x


def check(name, dtype):
  T, S, N, K, mask, options = CASES[name]
  arrays = make_arrays(T, S, N=N, K=K, H=16, V=24, dtype=dtype)
  how = dict(mask=mask()) | {key: make() for key, make in options.items()}

  def kernel(arrays):
    return attention(*arrays, implementation=KERNEL, return_lse=True, **how)

  found = jax.jit(kernel)(arrays)
  plain = jax.jit(lambda arrays: reference(*arrays, **how))(arrays)
  with jax.enable_x64(True):
    exact, how = jax.tree.map(to_64, (arrays, how))
    expected = jax.tree.map(np.asarray, reference(*exact, **how))
  for x, y in zip(found, plain, strict=True):
    assert x.shape == y.shape and x.dtype == y.dtype
  nothing = np.isneginf(expected[1])
  np.testing.assert_array_equal(np.isneginf(found[1]), nothing)
  np.testing.assert_array_equal(np.asarray(found[0], np.float32)[nothing], 0)
  floor = 1e-6 if dtype == np.float32 else 4e-3
  finite = lambda x: (x[0], jnp.where(nothing, 0, x[1]))  # noqa: E731
  for error, of_plain in zip(
    *(errors(finite(x), finite(expected)) for x in (found, plain)), strict=True
  ):
    assert error <= 2 * of_plain + floor


OFTEN = ('rows', 'several', 'few', 'extras')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.in_turn)
    for name in CASES
  ],
)
def test_outputs_and_denominators(name):
  check(name, np.float32)


@pytest.mark.parametrize('name', ['extras', 'several'])
def test_bfloat16(name):
  check(name, jnp.bfloat16)


@pytest.mark.parametrize('piece', [1, 10**9])
def test_pieces_of_any_length(monkeypatch, piece):
  monkeypatch.setattr(attention_decode, 'PIECE', piece)
  monkeypatch.setattr(attention_decode, '_tile', lambda *_: 128)
  check('rows', np.float32)


def test_what_no_query_sees_may_be_nan():
  """Room behind the cursor, padding in front, and both in one tile."""
  query, key, value = make_arrays(1, 600, N=4, K=2, H=16, V=24)
  at = jnp.arange(600)
  hidden = (at > ENDS[:, None]) | (at < STARTS[:, None])
  dirty = [
    jnp.where(hidden[:, :, None, None], jnp.nan, x) for x in (key, value)
  ]

  @jax.jit
  def run(*arrays):
    def loss(*arrays):
      out = attention(*arrays, mask=begun(), implementation=KERNEL)
      return jnp.sum(jnp.sin(out)), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)

  for x, y in zip(
    jax.tree.leaves(run(query, *dirty)),
    jax.tree.leaves(run(query, key, value)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def test_later_keys_change_no_bit():
  query, *rest = make_arrays(4, 600, N=4, K=2, H=16, V=24)
  run = jax.jit(
    functools.partial(
      attention, mask=masks.Causal(jnp.int32(300)), implementation=KERNEL
    )
  )
  out = run(query, *rest)
  for cut in (301, 302, 303, 304):
    found = run(query, *(x.at[:, cut:].set(7.0) for x in rest))
    same = cut - 300
    np.testing.assert_array_equal(found[:, :same], out[:, :same])


def test_gradients_are_those_of_the_definition():
  arrays = make_arrays(1, 600, N=4, K=2, H=16, V=24)

  def grads(arrays, gates, implementation):
    def loss(arrays, gates):
      bias = scores.Forget(gates, jnp.int32(420))
      mask = masks.Causal(jnp.int32(420))
      out = attention(
        *arrays, mask=mask, bias=bias, implementation=implementation
      )
      return jnp.sum(jnp.sin(out))

    return jax.grad(loss, (0, 1))(arrays, gates)

  gates = jnp.asarray(GATES, jnp.float32)
  found, expected = (
    jax.jit(functools.partial(grads, implementation=name))(arrays, gates)
    for name in (KERNEL, 'reference')
  )
  assert max(errors(found, expected)) < 1e-6


def test_a_cache_is_read_as_far_as_its_cursor():
  """The pieces that a step visits, and the one that it fetches instead."""
  cache = token_cache(2, 2048, jnp.float32, key=(2, 16))
  cache = cache.append(Context(), key=jnp.ones((2, 700, 2, 16)))
  mask = masks.Causal(cache.cursor.length - 1)
  _, kinds = attention_decode._added(mask, None, 1, 2048, 512, 1)
  np.testing.assert_array_equal(kinds, [[2, 1, 0, 0]])


def shapes(T, S, N=4, K=2, H=64, V=64, dtype=np.float32):
  sizes = ((1, T, N, H), (1, S, K, H), (1, S, K, V))
  return [jax.ShapeDtypeStruct(s, dtype) for s in sizes]


REFUSED = {
  'narrow': (shapes(1, 600, H=8), {}, 'H = 8'),
  'half': (shapes(1, 600, dtype=np.float16), {}, 'float16'),
  'cap': (shapes(1, 600), dict(logits_soft_cap=jnp.ones(())), 'soft_cap'),
  'rows': (shapes(8, 600, N=64), {}, 'T * N = 512'),
  'heads': (shapes(1, 600, N=256, K=256, H=1024), {}, 'fill the VMEM'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_it_refuses_it_says(name):
  arrays, options, message = REFUSED[name]
  named = explain_attention(*arrays, implementation=KERNEL, **options)
  assert named.startswith(f'none; not {KERNEL}: ') and message in named
  default = explain_attention(*arrays, **options)
  assert default.startswith('reference') and message in default


def test_a_tpu_decodes_with_the_kernel():
  decodes = lambda *s: explain_attention(*shapes(*s)).endswith(  # noqa: E731
    '; on tpu pallas_tpu'
  )
  assert decodes(1, 512) and decodes(8, 512) and decodes(1, 2**20)
  assert not decodes(1, 511) and not decodes(9, 512)
  assert explain_attention(*shapes(8, 2**17)).startswith(
    'reference: T = 8 query rows are too few to tile'
  )
  q, k, v = shapes(1, 600)

  def step(*arrays):
    return attention(*arrays, mask=masks.Causal(jnp.int32(5)))

  for platform, kernels in (('tpu', 1), ('cpu', 0)):
    text = jax.jit(step).trace(q, k, v).lower(lowering_platforms=(platform,))
    assert text.as_text().count('tpu_custom_call') == kernels


# page, heads of keys, pages of a sequence.
POOLS = {'small': (16, 2, 21), 'large': (256, 1, 3), 'one': (128, 4, 2)}


@pytest.mark.parametrize('name', POOLS)
@pytest.mark.parametrize('T', [1, 3])
def test_pages(name, T):
  page, K, M = POOLS[name]
  rng = np.random.default_rng(1)
  P = 3 * M
  normal = lambda *s: rng.standard_normal(s).astype(np.float32)  # noqa: E731
  query = normal(3, T, 4, 16)
  keys, values = normal(P, page, K, 16), normal(P, page, K, 24)
  table = rng.permutation(P).reshape(3, M).astype(np.int32)
  lengths = np.array([M * page, M * page // 2 + 3, 2], np.int32)
  used = np.zeros((P, page), bool)
  for row, length in zip(table, lengths, strict=True):
    for s in range(length):
      used[row[s // page], s % page] = True
  dirty = [
    np.where(used[..., None, None], x, np.float32(np.nan))
    for x in (keys, values)
  ]
  table[2, 1:] = 10**6  # not a page
  how = dict(scale=0.3, logits_soft_cap=2.0)
  found = jax.jit(
    functools.partial(paged_attention, implementation=KERNEL, **how)
  )(query, *dirty, table, lengths)
  with jax.enable_x64(True):
    arrays = map(to_64, (query, keys, values, table, lengths))
    expected = paged_attention(*map(jnp.asarray, arrays), **how)
    expected = np.asarray(expected)
  assert np.abs(found - expected).max() < 1e-6
  np.testing.assert_array_equal(found[2, : T - 2], 0)


def test_pages_are_read_in_place_on_a_tpu():
  query = jax.ShapeDtypeStruct((2, 1, 8, 64), np.float32)
  pages = lambda page: jax.ShapeDtypeStruct((9, page, 2, 64), np.float32)  # noqa: E731
  assert explain_paged_attention(query, pages(16)) == (
    'cpu: xla; tpu: pallas_tpu; cuda: xla; rocm: xla'
  )
  assert explain_paged_attention(query, pages(24)).endswith(
    'not pallas_tpu: page = 24, it takes multiples and divisors of 128'
  )
