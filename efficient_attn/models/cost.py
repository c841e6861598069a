"""FLOPs and memory of a function, counted by walking its jaxpr.

XLA's own cost analysis counts the body of a loop once; here a scan counts its
length, and a kernel what it says that it costs, or its body for every program
of its grid. Where a platform would take a kernel, the definition is counted.
Only matrix products and convolutions are counted as FLOPs, as is usual for the
utilisation of a machine.
"""

import collections
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core


class UnknownLengthError(Exception):
  """A loop ends when its values say so, and has no length to count."""


def flops(function: Callable, *args: Any) -> float:
  """Returns the FLOPs (2 per multiply-add) of the products in a call.

  Args:
    function: traced, not run.
    *args: arrays or their shapes.

  Raises:
    UnknownLengthError: a loop whose number of turns is not known.
  """
  return _total(jax.make_jaxpr(function)(*args).jaxpr, _flops)


def largest_array(function: Callable, *args: Any) -> int:
  """Returns the elements of the largest array that a call computes."""
  return _largest(jax.make_jaxpr(function)(*args).jaxpr)


class Counts(NamedTuple):
  """What one call costs.

  Attributes:
    flops: of the products, 2 per multiply-add.
    operations: these, and one for each element that anything else reads or
      writes, whichever are more; n log2 n for sorts, nothing for moving data.
    largest_array: elements of the largest array that is computed.
    peak_bytes: the most bytes of computed arrays needed at once, when each
      lives from where it is computed to its last use, in the order of the
      program and without fusion: XLA needs less.
  """

  flops: float
  operations: float
  largest_array: int
  peak_bytes: int


def count(function: Callable, *args: Any) -> Counts:
  """Counts a call, traced and not run; see `flops` for what it raises."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return Counts(
    flops=_total(jaxpr, _flops),
    operations=_total(jaxpr, _operations),
    largest_array=_largest(jaxpr),
    peak_bytes=_peak(jaxpr),
  )


def array_bytes(tree: Any) -> int:
  """Returns the bytes of a tree's floating arrays, or of their shapes."""
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  )


PRODUCTS = {'dot_general', 'ragged_dot_general', 'conv_general_dilated'}

# What only names, moves or makes up elements.
MOVES = {
  'broadcast_in_dim', 'concatenate', 'convert_element_type', 'copy',
  'dynamic_slice', 'dynamic_update_slice', 'gather', 'iota', 'pad', 'reshape',
  'rev', 'select_n', 'slice', 'split', 'squeeze', 'stop_gradient',
  'transpose', 'optimization_barrier',
}  # fmt: skip


# Whose inner function says how two elements combine.
COMBINES = ('reduce', 'arg', 'cum', 'scatter')


def _total(jaxpr, cost: Callable) -> float:
  """Returns the sum of `cost` over the equations, as often as they run."""
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    estimate = eqn.params.get('cost_estimate')  # of a kernel
    if estimate is not None:
      total += estimate.flops
      continue
    inner = [_total(j, cost) for j in _jaxprs(eqn)]
    if name.startswith(COMBINES) or not inner:
      total += cost(eqn)
    elif name == 'cond':
      total += max(inner)
    elif name == 'pallas_call':
      total += math.prod(eqn.params['grid_mapping'].grid) * sum(inner)
    elif name == 'while' and any(inner):
      raise UnknownLengthError('a loop of unknown length; use lax.scan')
    elif name == 'shard_map':
      total += eqn.params['mesh'].size * sum(inner)
    else:
      total += (eqn.params['length'] if name == 'scan' else 1) * sum(inner)
  return total


def _flops(eqn) -> float:
  size = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
  if eqn.primitive.name == 'dot_general':
    (contract, _), _ = eqn.params['dimension_numbers']
    lhs = eqn.invars[0].aval.shape
    return 2 * size * math.prod(lhs[axis] for axis in contract)
  if eqn.primitive.name == 'ragged_dot_general':
    ragged = eqn.params['ragged_dot_dimension_numbers']
    (contract, _), _ = ragged.dot_dimension_numbers
    lhs = eqn.invars[0].aval.shape
    size *= math.prod(lhs[axis] for axis in contract)
    if not ragged.rhs_group_dimensions:  # each group contracts its own rows
      size //= eqn.outvars[0].aval.shape[0]
    return 2 * size
  if eqn.primitive.name == 'conv_general_dilated':
    kernel = eqn.invars[1].aval.shape
    outputs = eqn.params['dimension_numbers'].rhs_spec[0]
    return 2 * size * math.prod(kernel) / kernel[outputs]
  return 0


def _operations(eqn) -> float:
  name = eqn.primitive.name
  if name in PRODUCTS:
    return _flops(eqn)
  if name in MOVES:
    return 0
  if name.startswith('scatter'):
    return math.prod(eqn.invars[-1].aval.shape)  # the updates
  shapes = [
    v.aval.shape
    for v in (*eqn.invars, *eqn.outvars)
    if hasattr(v.aval, 'shape')
  ]
  most = max(map(math.prod, shapes), default=0)
  if name in ('sort', 'top_k'):
    return most * math.log2(max(2, *shapes[0]))
  return most


def _peak(jaxpr) -> int:
  last = {}
  for i, eqn in enumerate(jaxpr.eqns):
    last |= {v: i for v in eqn.invars if not isinstance(v, core.Literal)}
  for v in jaxpr.outvars:
    if not isinstance(v, core.Literal):
      last[v] = len(jaxpr.eqns)
  alive, most = 0, 0
  ends = collections.defaultdict(int)
  for i, eqn in enumerate(jaxpr.eqns):
    for v in eqn.outvars:
      size = _bytes(v.aval)
      alive += size
      ends[last.get(v, i)] += size
    most = max(most, alive + max(map(_peak, _jaxprs(eqn)), default=0))
    alive -= ends.pop(i, 0)
  return most


def _bytes(aval) -> int:
  if not hasattr(aval, 'shape'):
    return 0
  return math.prod(aval.shape) * getattr(aval.dtype, 'itemsize', 4)


def _largest(jaxpr) -> int:
  return max(
    math.prod(v.aval.shape)
    for eqn in equations(jaxpr)
    for v in eqn.outvars
    if hasattr(v.aval, 'shape')
  )


def _jaxprs(eqn) -> Iterator[core.Jaxpr]:
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
  """Yields every equation, those of inner functions after their caller."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in _jaxprs(eqn):
      yield from equations(inner)
