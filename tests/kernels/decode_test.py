"""The kernel for few queries: races, and compiling for TPUs not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.attention.decode import (
  ALL,
  HIDDEN,
  NOTHING,
  SOME,
  Pieces,
  decode,
)
from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.ops.softmax.paged_attention import paged_attention
from tests.kernels.matrix_test import TOPOLOGIES, devices, races


@pytest.mark.parametrize('paged', [False, True])
def test_no_races_and_nothing_uninitialised(paged):
  """The interpreter that simulates a TPU's memories and copies."""
  interpret = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
  )
  B, T, N, K, H, S = 2, 1, 4, 2, 16, 768
  rng = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  query, key, value = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H)
  added = jnp.where(jnp.arange(S) < jnp.array([[700], [200]]), 0, HIDDEN)
  added = added[:, None, None].astype(jnp.float32)
  kinds, pages = jnp.array([[ALL, ALL, SOME], [SOME, NOTHING, NOTHING]]), None
  keys, count = 256, 1
  if paged:
    keys, count = 32, 4
    kinds = jnp.sum(added.reshape(B, -1, keys) == 0, 2)
    kinds = jnp.where(kinds == keys, ALL, jnp.where(kinds > 0, SOME, NOTHING))
    pages = jnp.asarray(
      rng.permutation(kinds.size).reshape(kinds.shape), jnp.int32
    )

    def pool(x):
      pages_of = x.reshape(-1, keys, K, H)
      return jnp.zeros_like(pages_of).at[pages.ravel()].set(pages_of)

    arrays = query, pool(key), pool(value)
  else:
    arrays = query, key, value

  def run(interpret, arrays, kinds, pages, keys, count):
    pieces = Pieces(
      keys=keys,
      tile=min(keys, 128),
      count=count,
      paged=pages is not None,
      scale=0.5,
      soft_cap=None,
      vmem=2**24,
      interpret=interpret,
    )
    return decode(*arrays, added, None, kinds, pages, pieces=pieces)

  whole = jnp.full((B, 1), SOME)
  expected = run(True, (query, key, value), whole, None, S, 1)
  for how in (interpret, True):
    found = run(how, arrays, kinds, pages, keys, count)
    for x, y in zip(found, expected, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  assert not races().races_found


AT = jnp.int32(900)
# B, T, N, K, H, V, S and options.
SHAPES = {
  'grouped': (8, 1, 16, 4, 128, 128, 4096, {}),
  'all heads': (2, 1, 16, 16, 64, 64, 1000, dict(sinks=jnp.ones(16))),
  'one head': (1, 1, 3, 1, 128, 64, 5000, dict(logits_soft_cap=30.0)),
  'latent': (1, 1, 64, 1, 576, 512, 2048, {}),
  'odd': (2, 2, 15, 3, 80, 65, 1000, {}),
  'several': (2, 4, 16, 4, 128, 128, 2048, {}),
  'bias': (2, 1, 16, 8, 256, 256, 1024, dict(bias=scores.Alibi(
    jnp.ones(16), AT))),
}  # fmt: skip
COMPILED = [
  pytest.param(shape, topology, dtype, marks=marks)
  for shape in SHAPES
  for topology in TOPOLOGIES
  for dtype in ('bfloat16', 'float32')
  for marks in (
    ()
    if (shape, topology, dtype) == ('grouped', 'v5e:2x2', 'bfloat16')
    else pytest.mark.in_turn
    if dtype == 'bfloat16' and topology in ('v5e:2x2', 'v4:2x2x1')
    else pytest.mark.exhaustive,
  )
]


def lower(function, topology, *arrays):
  mesh = jax.sharding.Mesh(np.array(devices(topology)[:1]), ('chip',))
  place = jax.NamedSharding(mesh, jax.P())
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*(
      jax.ShapeDtypeStruct(*x, sharding=place) for x in arrays
    ))  # fmt: skip


@pytest.mark.parametrize('shape, topology, dtype', COMPILED)
def test_compiles_for_tpus(shape, topology, dtype):
  B, T, N, K, H, V, S, options = SHAPES[shape]

  def step(query, key, value):
    return attention(
      query, key, value, mask=masks.Causal(AT),
      implementation='pallas_tpu', **options,
    )  # fmt: skip

  sizes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
  lowered = lower(step, topology, *((s, jnp.dtype(dtype)) for s in sizes))
  assert lowered.as_text().count('tpu_custom_call') == 1
  lowered.compile()


# Heads, and tokens of a page.
POOLS = [(4, 16), (8, 64), (1, 256), (3, 128)]


@pytest.mark.parametrize(
  'K, page, topology',
  [
    pytest.param(
      *pool,
      topology,
      marks=pytest.mark.in_turn
      if topology in ('v5e:2x2', 'v4:2x2x1')
      else pytest.mark.exhaustive,
    )
    for pool in POOLS
    for topology in TOPOLOGIES
  ],
)
def test_pages_compile_for_tpus(K, page, topology):
  bf16, i32 = jnp.dtype('bfloat16'), jnp.dtype('int32')
  pool = (2048 // page * 3, page, K, 128), bf16
  arrays = ((3, 1, 4 * K, 128), bf16), pool, pool, ((3, 2048 // page), i32)
  step = functools.partial(paged_attention, implementation='pallas_tpu')
  lowered = lower(step, topology, *arrays, ((3,), i32))
  assert lowered.as_text().count('tpu_custom_call') == 1
  lowered.compile()
