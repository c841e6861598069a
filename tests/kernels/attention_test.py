"""The attention kernels: their tiles and races."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.attention.backward import backward
from efficient_attn.kernels.attention.forward import forward
from efficient_attn.kernels.attention.layout import Options
from efficient_attn.kernels.attention.terms import Term
from efficient_attn.kernels.attention.tiles import (
  FULL,
  LOWER,
  UPPER,
  make_schedule,
)
from efficient_attn.ops import masks
from tests.kernels.additive_test import races


def lists(schedule, span, i):
  """(kind, tile) of the tiles of a block of queries in a span."""
  starts = schedule.array('starts').reshape(-1, 5)
  starts = starts[span * schedule.num_blocks + i]
  return [
    (kind, tile)
    for kind in range(4)
    for tile in schedule.array('tiles')[starts[kind] : starts[kind + 1]]
  ]


def test_tiles_by_kind():
  window = functools.partial(masks.Window(7, 0).block_map, 32, 30)
  schedule = make_schedule(window, 32, 30, 8, 8, span=2)
  assert (schedule.num_blocks, schedule.num_spans) == (4, 2)
  assert schedule.present == (LOWER, UPPER)
  assert lists(schedule, 0, 1) == [(LOWER, 1), (UPPER, 0)]
  assert lists(schedule, 1, 2) == [(LOWER, 0)]
  assert lists(schedule, 0, 2) == [(UPPER, 1)]
  # A tile that holds the last key, and places behind it, is masked.
  ones = lambda rows, cols: np.full((-(-9 // rows), -(-12 // cols)), 2)  # noqa: E731
  schedule = make_schedule(ones, 9, 12, 8, 8, span=9)
  assert lists(schedule, 0, 0) == [(FULL, 0), (LOWER, 1)]


def test_no_races_and_nothing_uninitialised():
  """The interpreter that simulates a TPU's memories and copies."""
  interpret = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
  )
  T, N, K, H = 512, 2, 1, 16
  rng = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  q, k, v, d_out = (normal(1, T, n, H) for n in (N, K, K, N))
  ids = jnp.asarray(np.repeat([1, 2], [300, 212])[None].astype(np.int32))

  def pairs(query, key, ids):
    return (ids[0] == ids[1]) & (key <= query)

  causal = functools.partial(masks.Causal().block_map, T, T)
  some = jnp.asarray([[[1, 0, 1]]], jnp.int32)

  def run(interpret, span):
    options = Options(
      schedule=make_schedule(causal, T, T, 256, 256, span),
      scale=0.5,
      soft_cap=None,
      mask=Term(pairs, ('BT', 'BS')),
      bias=None,
      hides=False,
      vmem=2**24,
      interpret=interpret,
    )
    ids_twice = (ids[:, :], ids[:, :])
    operands = (ids_twice, (), None if span == 1 else some)
    out, top, total = forward(q, k, v, None, operands, options=options)
    *grads, _ = backward(
      q, k, v, d_out, top, 1 / total, jnp.sum(d_out * out, -1), operands,
      options=options,
    )  # fmt: skip
    return out, *grads

  for span in (2, 1):
    for x, y in zip(run(interpret, span), run(True, span), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  assert not races().races_found
