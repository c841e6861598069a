"""What the blocks of a kernel move is read from its index maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_attn import ops
from experiments.benchmarks.grids import Grid, kernel_grids

X = jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)
BLOCK = 8 * 128 * 4


def copy(*refs):
  refs[-1][...] = refs[-2][...]


def call(index_map, table=None, name='copy'):
  """Copies 8 rows a program, from the block that `index_map` names."""
  spec = functools.partial(pl.BlockSpec, (None, 8, 128))
  tables = [] if table is None else [np.array(table, np.int32)]
  grid = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=len(tables),
    grid=(2, 8),
    in_specs=[spec(index_map)],
    out_specs=spec(lambda b, i, *_: (b, i, 0)),
  )
  return lambda x: pl.pallas_call(copy, grid_spec=grid, out_shape=X, name=name)(
    *tables, x
  )


@pytest.mark.parametrize(
  'index_map, table, reads',
  [
    (lambda b, i: (b, i, 0), None, 16),
    (lambda b, i: (b, jax.lax.div(i, 4), 0), None, 4),
    (lambda b, i: (0, 0, 0), None, 1),
    (lambda b, i, table: (b, table[i], 0), [0, 0, 1, 1, 2, 2, 2, 2], 6),
    (lambda b, i, table: (b, jax.lax.div(i, 4), 0), [0] * 8, 4),
  ],
)
@pytest.mark.parametrize('jitted', [False, True])
def test_a_block_moves_when_it_changes(index_map, table, reads, jitted):
  run = call(index_map, table)
  jaxpr = jax.make_jaxpr(jax.jit(run) if jitted else run)(X)
  assert kernel_grids(jaxpr) == {'copy': Grid(16, (reads + 16) * BLOCK)}


def test_a_table_that_is_computed_moves_a_block_a_program():
  spec = functools.partial(pl.BlockSpec, (None, 8, 128))
  grid = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(2, 8),
    in_specs=[spec(lambda b, i, table: (b, table[0], 0))],
    out_specs=spec(lambda b, i, table: (b, i, 0)),
  )
  run = pl.pallas_call(copy, grid_spec=grid, out_shape=X, name='copy')
  table = jax.ShapeDtypeStruct((1,), jnp.int32)
  jaxpr = jax.make_jaxpr(run)(table, X)
  assert kernel_grids(jaxpr) == {'copy': Grid(16, 32 * BLOCK)}


def test_kernels_of_one_name_must_be_one():
  whole = call(lambda b, i: (b, i, 0))
  part = call(lambda b, i: (0, 0, 0))
  twice = jax.make_jaxpr(lambda x: whole(whole(x)))(X)
  assert len(kernel_grids(twice)) == 1
  unnamed = kernel_grids(
    jax.make_jaxpr(call(lambda b, i: (b, i, 0), name=None))(X)
  )
  assert list(unnamed) == [(X.size * 4,)]
  with pytest.raises(ValueError, match="two kernels are 'copy'"):
    kernel_grids(jax.make_jaxpr(lambda x: part(whole(x)))(X))


def test_kernels_of_an_op_are_found_before_it_is_lowered():
  x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
  decay = jax.ShapeDtypeStruct((1, 256, 2), jnp.float32)

  def loss(x, decay):
    out, _ = ops.linear_attention(x, x, x, log_decay=decay)
    return out.astype(jnp.float32).sum()

  found = kernel_grids(jax.make_jaxpr(jax.grad(loss))(x, decay))
  assert set(found) == {'scalar_gate_forward', 'scalar_gate_backward'}
  assert {grid.programs for grid in found.values()} == {2}


def test_loops_turn_as_tables_and_places_say():
  starts = np.array([0, 2, 2, 5, 9], np.int32)

  def loops(starts_ref, size_ref, x_ref, o_ref):
    i = pl.program_id(0)
    o_ref[...] = jnp.zeros_like(o_ref)

    def add(_, value=None):
      o_ref[...] += x_ref[...]

    jax.lax.fori_loop(0, i + 1, lambda j, _: add(j), None)
    jax.lax.fori_loop(0, 3, lambda j, _: add(j), None)  # of the schedule

    @pl.when(i > 0)
    def _():
      jax.lax.fori_loop(starts_ref[i], starts_ref[i + 1], add, None)

    jax.lax.fori_loop(0, jnp.where(i == 3, 8, 4 * i // 2), add, None)
    jax.lax.fori_loop(0, size_ref[0], add, None)

  block = pl.BlockSpec((8, 128), lambda i, *_: (i, 0))
  x = jax.ShapeDtypeStruct((32, 128), jnp.float32)
  run = pl.pallas_call(
    loops,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(4,), in_specs=[block], out_specs=block
    ),
    out_shape=x,
    name='loops',
  )
  size = jax.ShapeDtypeStruct((1,), jnp.int32)
  jaxpr = jax.make_jaxpr(lambda size, x: run(starts, size, x))(size, x)
  (found,) = kernel_grids(jaxpr).values()
  assert found.loops == (2.5, 9 / 4, (0 + 2 + 4 + 8) / 4, None)
