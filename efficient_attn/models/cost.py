"""FLOPs and memory of a function, counted by walking its jaxpr.

XLA's own cost analysis counts the body of a loop once; here a scan counts its
length. Only matrix products and convolutions are counted as FLOPs, as is usual
for the utilisation of a machine.
"""

import collections
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core


def flops(function: Callable, *args: Any) -> float:
  """Returns the FLOPs (2 per multiply-add) of the products in a call.

  Args:
    function: traced, not run.
    *args: arrays or their shapes.

  Raises:
    NotImplementedError: a loop whose number of turns is not known.
  """
  return _flops(jax.make_jaxpr(function)(*args).jaxpr)


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
    _flops(jaxpr), _operations(jaxpr), _largest(jaxpr), _peak(jaxpr)
  )


# What only names, moves or makes up elements.
MOVES = {
  'broadcast_in_dim', 'concatenate', 'convert_element_type', 'copy',
  'dynamic_slice', 'dynamic_update_slice', 'gather', 'iota', 'pad', 'reshape',
  'rev', 'select_n', 'slice', 'split', 'squeeze', 'stop_gradient',
  'transpose', 'optimization_barrier',
}  # fmt: skip


def _operations(jaxpr) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    name, inner = eqn.primitive.name, list(_jaxprs(eqn))
    if name in ('dot_general', 'conv_general_dilated'):
      total += _flops_of(eqn)
    elif name == 'cond':
      total += max(_operations(b.jaxpr) for b in eqn.params['branches'])
    elif name == 'while':
      raise NotImplementedError('a loop of unknown length; use lax.scan')
    elif inner and not name.startswith(('reduce', 'arg', 'cum', 'scatter')):
      times = eqn.params.get('length', 1) if _is_scan(eqn) else _shards(eqn)
      total += times * sum(map(_operations, inner))
    elif name.startswith('scatter'):
      total += math.prod(eqn.invars[-1].aval.shape)  # the updates
    elif name not in MOVES:
      shapes = [
        v.aval.shape
        for v in (*eqn.invars, *eqn.outvars)
        if hasattr(v.aval, 'shape')
      ]
      each = 1.0
      if name in ('sort', 'top_k'):
        each = math.log2(max(2, *shapes[0]))
      total += each * max(map(math.prod, shapes))
  return total


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
    for eqn in _walk(jaxpr)
    for v in eqn.outvars
    if hasattr(v.aval, 'shape')
  )


def _flops(jaxpr) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
      total += _flops_of(eqn)
    elif eqn.primitive.name == 'cond':
      total += max(_flops(b.jaxpr) for b in eqn.params['branches'])
    elif eqn.primitive.name == 'while':
      inner = sum(_flops(j) for j in _jaxprs(eqn))
      if inner:
        raise NotImplementedError(
          'matrix products in a loop of unknown length; use lax.scan'
        )
    else:
      times = eqn.params.get('length', 1) if _is_scan(eqn) else _shards(eqn)
      total += times * sum(_flops(j) for j in _jaxprs(eqn))
  return total


def _flops_of(eqn) -> float:
  """Returns the FLOPs of one matrix product or convolution."""
  size = math.prod(eqn.outvars[0].aval.shape)
  if eqn.primitive.name == 'dot_general':
    (contract, _), _ = eqn.params['dimension_numbers']
    lhs = eqn.invars[0].aval.shape
    return 2 * size * math.prod(lhs[axis] for axis in contract)
  kernel = eqn.invars[1].aval.shape
  outputs = eqn.params['dimension_numbers'].rhs_spec[0]
  return 2 * size * math.prod(kernel) / kernel[outputs]


def _is_scan(eqn) -> bool:
  return eqn.primitive.name == 'scan'


def _shards(eqn) -> int:
  """Returns on how many shards the body of a shard_map runs, else 1."""
  return eqn.params['mesh'].size if eqn.primitive.name == 'shard_map' else 1


def _jaxprs(eqn) -> Iterator[core.Jaxpr]:
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _walk(jaxpr) -> Iterator[core.JaxprEqn]:
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in _jaxprs(eqn):
      yield from _walk(inner)
