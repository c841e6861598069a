"""The attention kernels: races, and compiling for TPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax.attention import attention
from tests.kernels.matrix_test import TOPOLOGIES, devices, races


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
      q, k, v, out, d_out, top, 1 / total, jnp.zeros_like(top), operands,
      options=options,
    )  # fmt: skip
    return out, *grads

  for span in (2, 1):
    for x, y in zip(run(interpret, span), run(True, span), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  assert not races().races_found


C = masks.Causal()
FLAGS = np.array([True, False, True, False])
WINDOWS = np.array([1, 20, 300, 4]), np.array([0, 1, 2, 3])
# Mask of segment ids, T, S, K, H, V and options of calls of 4 query heads.
SHAPES = {
  'causal': (lambda ids: C, 600, 600, 4, 128, 128, {}),
  'packed': (lambda ids: masks.packed(C, ids), 600, 600, 2, 64, 128, {}),
  'all': (
    lambda ids: masks.packed(masks.Prefix(3) | masks.Window(64, 0), ids),
    600, 600, 1, 128, 64,
    dict(
      bias=scores.Alibi(jnp.ones(4)),
      sinks=jnp.ones(4),
      logits_soft_cap=30.0,
    ),
  ),
  'forget': (
    lambda ids: C, 600, 600, 2, 128, 128,
    dict(bias=scores.Forget(-jnp.ones((1, 600, 4)))
         + scores.Dense(jnp.ones((4, 600, 1)))),
  ),
  'bias': (
    lambda ids: C, 600, 600, 2, 128, 128,
    dict(bias=scores.Dense(np.ones((4, 600, 600), np.float32))),
  ),
  'forget long': (
    lambda ids: C, 8192, 8192, 1, 128, 128,
    dict(bias=scores.Forget(-jnp.ones((1, 8192, 4)))),
  ),
  'hidden': (
    lambda ids: masks.Segments(ids, ids[:, :300]), 600, 300, 4, 256, 256, {},
  ),
  'heads': (
    lambda ids: masks.Heads(FLAGS) & C
    | ~masks.Heads(FLAGS) & masks.HeadWindow(*WINDOWS),
    600, 600, 2, 80, 65, {},
  ),
  'dense': (
    lambda ids: masks.Dense((ids > 0)[:, None, None]) & masks.Strided(16),
    600, 600, 4, 64, 64, {},
  ),
  'layout': (
    lambda ids: masks.RandomBlocks(640, 64, 3, 0, True) | masks.Fixed(16, 2),
    600, 600, 4, 64, 64, {},
  ),
  'long': (lambda ids: masks.Window(4095, 0), 32768, 32768, 1, 128, 128, {}),
}  # fmt: skip
COMPILED = [
  pytest.param(shape, topology, dtype, marks=marks)
  for shape in SHAPES
  for topology in TOPOLOGIES
  for dtype in ('bfloat16', 'float32')
  for marks in (
    ()
    if (shape, topology, dtype) == ('packed', 'v5e:2x2', 'bfloat16')
    else pytest.mark.in_turn
    if dtype == 'bfloat16' and (topology == 'v5e:2x2' or shape == 'packed')
    else pytest.mark.exhaustive,
  )
]


@pytest.mark.parametrize('shape, topology, dtype', COMPILED)
def test_compiles_for_tpus(shape, topology, dtype):
  mask, T, S, K, H, V, options = SHAPES[shape]
  mesh = jax.sharding.Mesh(np.array(devices(topology)[:1]), ('chip',))
  leaf = functools.partial(
    jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, jax.P())
  )
  q, k, v = (
    leaf(s, jnp.dtype(dtype))
    for s in ((1, T, 4, H), (1, S, K, H), (1, S, K, V))
  )

  def both(q, k, v, ids):
    def call(*arrays):
      return attention(
        *arrays, mask=mask(ids), implementation='pallas_tpu', **options
      )

    out, pull = jax.vjp(call, q, k, v)
    return out, pull(out)

  with jax.set_mesh(mesh):  # says what kind of device it is
    lowered = jax.jit(both).lower(q, k, v, leaf((1, T), jnp.int32))
  # Where keys and values do not fit, dq has a kernel of its own.
  assert lowered.as_text().count('tpu_custom_call') in (2, 3)
  lowered.compile()
