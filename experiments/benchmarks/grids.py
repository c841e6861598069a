"""The kernels of a traced program: their grids, loops, and memory traffic."""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr


class Grid(NamedTuple):
  """A kernel that was called.

  Attributes:
    programs: of its grid.
    traffic: bytes of the main memory that its blocks read and write, one that
      stays from a program to the next once.
    loops: the mean turns of each loop whose bounds are found at run time, from
      tables that are constants; None where they are not.
  """

  programs: int
  traffic: int
  loops: tuple[float | None, ...] = ()


def kernel_grids(jaxpr) -> dict[str | tuple[int, ...], Grid]:
  """Returns the kernels of a closed jaxpr by name.

  A program calls a kernel without a name as it likes; it is known by the bytes
  of its results.
  """
  found = {}
  for equation, tables in _kernels(jaxpr, {}):
    results = (x.aval for x in equation.outvars)
    sizes = tuple(x.size * x.dtype.itemsize for x in results)
    name = equation.params['name'] or sizes
    mapping = equation.params['grid_mapping']
    grid = Grid(
      math.prod(mapping.grid),
      sum(_moved(x, mapping.grid, tables) for x in mapping.block_mappings),
      tuple(_loops(equation.params['jaxpr'], mapping, tables)),
    )
    if found.setdefault(name, grid) != grid:
      raise ValueError(f'two kernels are {name!r}: {found[name]}, {grid}')
  return found


def _kernels(closed, known) -> Iterator:
  """Calls of kernels, with the tables that their index maps read.

  Args:
    closed: a jaxpr with its constants.
    known: values of its arguments by their place, those that are constants.
  """
  jaxpr = closed.jaxpr
  values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  values |= {jaxpr.invars[i]: value for i, value in known.items()}
  for equation in jaxpr.eqns:
    given = {
      i: getattr(x, 'val', None) if hasattr(x, 'val') else values[x]
      for i, x in enumerate(equation.invars)
      if hasattr(x, 'val') or x in values
    }
    if equation.primitive.name == 'pallas_call':
      count = equation.params['grid_mapping'].num_index_operands
      yield equation, [given.get(i) for i in range(count)]
      continue
    if equation.primitive.name == 'per_platform':  # traced when it is lowered
      kernels = dict(equation.params['kernels'])
      kernel = kernels.get('tpu', kernels.get(None))
      arrays = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
        for x in equation.invars
      ]
      inner = [jax.make_jaxpr(kernel)(*arrays)] if kernel else []
    else:
      inner = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
      )
    for value in inner:
      if hasattr(value, 'eqns'):
        if not hasattr(value, 'consts'):
          value = ClosedJaxpr(value, [])
        same = len(value.jaxpr.invars) == len(equation.invars)
        yield from _kernels(value, given if same else {})


def _moved(block, grid, tables):
  """Bytes that an operand moves: of its block, when it changes."""
  # Of an axis without a block size one row, which the block has not.
  size = math.prod(getattr(x, 'block_size', 1) for x in block.block_shape)
  size *= block.array_aval.dtype.itemsize
  reads = {
    x for equation in block.index_map_jaxpr.jaxpr.eqns for x in equation.invars
    if not hasattr(x, 'val')
  }  # fmt: skip
  refs = block.index_map_jaxpr.jaxpr.invars[len(grid) :]
  tables = [
    table if ref in reads else np.zeros(ref.aval.shape, ref.aval.dtype)
    for table, ref in zip(tables, refs, strict=True)
  ]
  if any(table is None for table in tables):  # not known: another every time
    return size * math.prod(grid)
  places = np.indices(grid, np.int32).reshape(len(grid), -1)

  @jax.jit  # here: what was traced for other devices is not run on them
  @jax.vmap
  def starts(*place):
    return block.compute_start_indices_interpret(place, *tables)

  rows = np.stack(
    [np.broadcast_to(x, places[0].shape) for x in starts(*places)]
  )
  changes = np.any(rows[:, 1:] != rows[:, :-1], axis=0)
  return size * (1 + int(np.count_nonzero(changes)))


def _loops(jaxpr, mapping, tables):
  """The mean turns of the loops of a kernel, in the order of their text."""
  grid = mapping.grid
  places = np.indices(grid, np.int32).reshape(len(grid), -1)
  # A kernel does not count the axes that `vmap` has put before its grid.
  mapped = set(mapping.vmapped_dims)
  places = np.stack([x for i, x in enumerate(places) if i not in mapped])
  known = dict(zip(jaxpr.invars, tables, strict=False))
  yield from _turns(
    jaxpr, places, {x: t for x, t in known.items() if t is not None}
  )


def _turns(jaxpr, places, known):
  """The mean turns of loops; `known` has values by program, or of tables."""
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    values = [
      np.broadcast_to(x.val, places.shape[1:])
      if hasattr(x, 'val')
      else known.get(x)
      for x in equation.invars
    ]
    complete = all(x is not None for x in values)
    if name == 'program_id':
      known[equation.outvars[0]] = places[params['axis']]
    elif name == 'get' and complete and values[0].ndim == len(values) - 1:
      known[equation.outvars[0]] = values[0][tuple(values[1:])]
    elif name == 'while':
      consts = params['cond_nconsts'], params['body_nconsts']
      first, last = values[sum(consts) : sum(consts) + 2]
      unknown = first is None or last is None
      yield None if unknown else float(np.mean(np.maximum(last - first, 0)))
      inner = params['body_jaxpr'].jaxpr
      yield from _turns(
        inner, places, _inside(inner, values[consts[0] : sum(consts)])
      )
    elif name in ('scan', 'cond', 'jit', 'pjit'):
      closed = [params['jaxpr']] if 'jaxpr' in params else params['branches']
      if name == 'scan':
        values = []
      elif name == 'cond':
        values = values[1:]
      for inner in closed:
        inner = inner.jaxpr
        inside = _inside(inner, values)
        yield from _turns(inner, places, inside)
        if name in ('jit', 'pjit'):
          known |= {
            outer: inside[x]
            for outer, x in zip(equation.outvars, inner.outvars, strict=True)
            if not hasattr(x, 'val') and x in inside
          }
    elif complete and all(x.aval.shape == () for x in equation.outvars):
      bind = functools.partial(equation.primitive.bind, **params)
      out = jax.vmap(bind)(*values) if values else bind()
      if not equation.primitive.multiple_results:
        known[equation.outvars[0]] = np.asarray(out)


def _inside(jaxpr, values):
  return {
    x: value
    for x, value in zip(jaxpr.invars, values, strict=False)
    if value is not None
  }
