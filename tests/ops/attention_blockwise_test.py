import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.softmax import attention_tiles
from efficient_attn.ops.softmax.attention_blockwise import attention_blockwise
from efficient_attn.ops.softmax.attention_reference import attention_reference
from efficient_attn.ops.softmax.attention_tiles import (
  choose_tiles,
  fit_block,
  tile_schedule,
)
from tests.ops.attention_cases import make_arrays


def test_visited_tiles():
  for blocks in (1, 4, 9):
    causal = tile_schedule(masks.Causal(), 8 * blocks, 8 * blocks, 8, 8)
    assert len(causal) == blocks * (blocks + 1) // 2
  assert len(tile_schedule(None, 64, 32, 8, 8)) == 32
  # A window of w keys touches w / block + 1 blocks of each block of queries.
  for T in (256, 512, 1024):
    visited = len(tile_schedule(masks.Window(31, 0), T, T, 16, 16))
    assert visited <= (T // 16) * (32 // 16 + 1)
  assert len(tile_schedule(masks.Window(-3, 2), 64, 64, 8, 8)) == 0
  schedule = tile_schedule(masks.Causal(-8), 24, 24, 8, 8)
  np.testing.assert_array_equal(
    schedule,
    [
      # block row, first column, kind
      [1, 0, masks.PARTIAL],
      [2, 0, masks.FULL],
      [2, 8, masks.PARTIAL],
    ],
  )


@pytest.fixture(params=['CORE', 'MACHINE'])
def costs(request, monkeypatch):
  """One virtual device a core, or one for all."""
  found = getattr(attention_tiles, request.param)
  monkeypatch.setattr(attention_tiles, 'costs_here', lambda: found)
  return found


@pytest.mark.parametrize('T, S', [(600, 600), (234, 1301), (1025, 1025)])
@pytest.mark.parametrize('mask', [None, masks.Causal(), masks.Window(300, 9)])
def test_tiles_of_its_own_choice_where_none_divides_the_length(
  T, S, mask, costs
):
  tiling = choose_tiles(mask, T, S)
  visits = np.zeros((T, S), int)
  for i, start, *_ in tiling.tiles:
    rows = slice(i * tiling.block_q, (i + 1) * tiling.block_q)
    visits[rows, start : start + tiling.block_k] += 1
  admitted = np.ones((T, S), bool)
  if mask is not None:
    admitted = np.asarray(mask.dense(T, S))[0, 0]
  assert visits.max() == 1
  np.testing.assert_array_equal(visits[admitted], 1)

  arrays = make_arrays(T, S, N=2, K=1, B=1)

  def run(op):
    def loss(*arrays):
      out, stats = op(*arrays, mask=mask)
      lse = stats.lse
      return jnp.sum(out**2) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0)), out

    grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(grad)(*arrays)
    return out, *grads

  for found, wanted in zip(
    run(attention_blockwise), run(attention_reference), strict=True
  ):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_blocks_are_equal_and_few():
  assert [fit_block(T, 512) for T in (1, 511, 512, 513, 768, 1024, 1025)] == [
    1,
    511,
    512,
    257,
    384,
    512,
    342,
  ]


def equations(jaxpr):
  """Every equation, those of inner jaxprs included."""
  for equation in jaxpr.eqns:
    yield equation
    for parameter in equation.params.values():
      inner = parameter if isinstance(parameter, tuple | list) else [parameter]
      for item in inner:
        item = getattr(item, 'jaxpr', item)
        if hasattr(item, 'eqns'):
          yield from equations(item)


def trace(mask, T, gradient=False):
  q = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)

  def f(q, k, v):
    return jnp.sum(attention_blockwise(q, k, v, mask=mask)[0])

  f = jax.grad(f, argnums=(0, 1, 2)) if gradient else f
  return list(equations(jax.make_jaxpr(f)(q, q, q).jaxpr))


@pytest.mark.parametrize('gradient', [False, True])
def test_trip_counts_are_static_and_empty_tiles_cost_nothing(gradient, costs):
  T, ids = 2048, jnp.zeros((1, 2048), jnp.int32)
  core = costs is attention_tiles.CORE
  cases = [
    # full tiles, other tiles
    (None, [64] if core else [32], False),
    (masks.Causal(), [28, 8] if core else [12, 8], False),
    (masks.Window(256, 0), [15, 30] if core else [8], False),
    (masks.Causal() & masks.Segments(ids, ids), [36] if core else [20], True),
    (masks.Causal(jnp.int32(0)), [64] if core else [32], True),
  ]
  for mask, trips, skips in cases:
    found = trace(mask, T, gradient)
    lengths = [e.params['length'] for e in found if e.primitive.name == 'scan']
    assert lengths == trips * (2 if gradient else 1)
    names = [e.primitive.name for e in found]
    assert 'while' not in names
    assert ('cond' in names) == skips


@pytest.mark.parametrize('gradient', [False, True])
def test_a_window_visits_tiles_in_proportion_to_its_pairs(gradient, costs):
  def visited(T, window):
    found = trace(masks.Window(window - 1, 0), T, gradient)
    trips = [e.params['length'] for e in found if e.primitive.name == 'scan']
    forward = trips[: len(trips) // (1 + gradient)]
    assert trips == forward * (1 + gradient)
    return sum(forward)

  # O(T w / block^2): a window of w in tiles of 128 touches w / 128 + 1 of them.
  for T, window in ((8192, 128), (16384, 128), (16384, 256), (32768, 512)):
    assert visited(T, window) <= (T // 128) * (window // 128 + 1)
  assert visited(32768, 256) == pytest.approx(2 * visited(16384, 256), rel=0.01)


@pytest.mark.parametrize('gradient', [False, True])
def test_largest_intermediate_is_linear_in_length(gradient):
  sizes = [
    max(
      x.aval.size
      for equation in trace(masks.Causal(), T, gradient)
      for x in equation.outvars
    )
    for T in (2**15, 2**16)
  ]
  assert sizes[1] == 2 * sizes[0]


def test_run_time_empty_tiles_are_not_computed():
  # A NaN in a tile that no pair needs would spread through 0 * NaN.
  ids = jnp.repeat(jnp.arange(3), 4)[None]
  q, k, v = make_arrays(12, 12, B=1)
  op = functools.partial(attention_blockwise, block_q=4, block_k=4)
  mask = masks.Segments(ids, ids)
  grad = jax.grad(lambda q, k, v: jnp.sum(op(q, k, v, mask=mask)[0][:, :8]))
  expected = grad(q, k, v)[:, :8]
  found = grad(q, k, v.at[:, 8:].set(jnp.nan))[:, :8]
  np.testing.assert_array_equal(found, expected)
