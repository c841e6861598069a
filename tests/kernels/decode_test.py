"""The kernel for few queries: races."""

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
from tests.kernels.matrix_test import races


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
