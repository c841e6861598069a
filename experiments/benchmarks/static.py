"""Ops on a TPU that is not there: kernels, XLA forms and peers.

Every op of `static_ops.OPS` is compiled for a topology; see `schedule` and
`bundles` for what is read of it. A kernel takes max(cycles / clock, traffic /
bandwidth); the cycles of other operations have their traffic in them. Arrays
lie in the layout that the compiler chooses, so that what is compared is the op
and not the layout of a caller's arrays.

python launch/bench.py --suite=static --topology=v5e:2x2
"""

import functools
import math
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout

from efficient_attn.config import choose
from experiments.benchmarks import bundles, grids, schedule
from experiments.benchmarks.static_ops import FLOAT32, INT32, OPS, SIZES
from experiments.benchmarks.static_report import write_report


class Chip(NamedTuple):
  """What one chip can do: clock in Hz, FLOP/s in bfloat16, bytes/s."""

  clock: float
  flops: float
  bandwidth: float


CHIPS = {
  'v4': Chip(1.05e9, 275e12, 1228e9),
  'v5e': Chip(1.5e9, 197e12, 819e9),
  'v5p': Chip(1.75e9, 459e12, 2765e9),
  'v6e': Chip(1.75e9, 918e12, 1640e9),
}
# Figures that may not become worse unnoticed.
GUARDED = ('ms', 'cycles', 'traffic GB', 'temporary MiB')
ROWS = OPS
__all__ = ['ROWS', 'measure', 'write_report']


class Case(NamedTuple):
  """A program: an op, forward or with its gradients, in an implementation."""

  op: str
  which: str
  implementation: str


def measure(topology: str, rows: tuple[str, ...]) -> dict[str, float]:
  """Returns figures of every pass and implementation of the ops `rows`.

  They are named op/pass/implementation/figure; kernels have figures of their
  own, op/pass/implementation/kernel/figure.
  """
  chip = chip_of(topology)
  cases = [
    Case(op, which, implementation)
    for op in rows
    for which in OPS[op].passes
    for implementation in (*OPS[op].implementations, *OPS[op].peers)
  ]
  figures = {}
  for case, found in zip(cases, run(topology, cases), strict=True):
    if isinstance(found, str):
      print('/'.join(case), found, flush=True)
      continue
    print('/'.join(case), f'{found["ms"]:.2f} ms', flush=True)
    figures |= {'/'.join((*case, what)): x for what, x in found.items()}
  for op in rows:
    for which in OPS[op].passes:
      ideal = 1e3 * roofline(OPS[op], which, chip)
      figures[f'{op}/{which}/roofline/ms'] = ideal
  return figures


def chip_of(topology: str) -> Chip:
  """Returns the chip of a topology, 'v5e:2x2' say."""
  return choose('--topology', topology.split(':')[0], CHIPS)


def run(topology: str, cases: list[Case]) -> Iterator[dict | str]:
  """Yields the figures of each case, or why there are none."""
  yield from bundles.each(functools.partial(figures_of, topology), cases)


def figures_of(topology: str, folder: str, case: Case) -> dict | str:
  """Compiles a case in a process that dumps schedules to a folder."""
  row, chip = OPS[case.op], chip_of(topology)
  device, *_ = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
  if case.implementation in row.peers:
    peer = row.peers[case.implementation]
    if missing := peer.missing(topology):
      return missing
    call, conditions = peer.build(device), peer.conditions
  else:
    statics = row.implementations[case.implementation]
    call, conditions = functools.partial(row.call, **statics), row.conditions
  mesh = jax.sharding.Mesh(np.array([device]), ('chip',))
  with jax.set_mesh(mesh):  # says what kind of device it is
    traced = _traced(mesh, row, call, case.which)
    compiled = traced.lower().compile()
  program = schedule.read_program(compiled.as_text())
  called = grids.kernel_grids(traced.jaxpr)
  found = cost_of(program, called, folder, conditions, chip)
  memory = compiled.memory_analysis()
  return found | {'temporary MiB': memory.temp_size_in_bytes / 2**20}


def _traced(mesh, row, call, which):
  arrays = {
    name: jax.ShapeDtypeStruct(
      [SIZES[axis] for axis in axes],
      jnp.float32
      if name in FLOAT32
      else jnp.int32
      if name in INT32
      else jnp.bfloat16,
    )
    for name, axes in row.arrays.items()
  }

  def forward(arrays):
    return call(**arrays)

  def both(arrays, cotangent):
    out, pull = jax.vjp(forward, arrays)
    return out, pull(cotangent)

  chosen = Format(Layout.AUTO, jax.NamedSharding(mesh, jax.P()))
  jit = functools.partial(jax.jit, in_shardings=chosen, out_shardings=chosen)
  if which == 'forward':
    return jit(forward).trace(arrays)
  return jit(both).trace(arrays, jax.eval_shape(forward, arrays))


def cost_of(
  program: schedule.Program,
  called: dict[str | tuple[int, ...], grids.Grid],
  folder: str,
  conditions: dict[str, tuple[float, ...]],
  chip: Chip,
) -> dict[str, float]:
  """Sums a program and its kernels, whose schedules this process dumped.

  Args:
    program: as compiled.
    called: the kernels that were traced.
    folder: of the dumps.
    conditions: see `bundles.read_kernel`, by the name of the kernel.
    chip: on which it runs.

  Returns:
    Figures by name.
  """
  cycles, traffic, seconds, found = program.cycles, program.traffic, 0, {}
  for launched in program.kernels:
    name, times = launched.operation.name, launched.times
    base = re.sub(r'\.\d+$', '', name)
    sizes = tuple(size for size, _ in launched.operation.results)
    grid = called[base if base in called else sizes]
    kernel = bundles.read_kernel(folder, name, grid, conditions.get(base, ()))
    cycles += times * kernel.cycles
    traffic += times * grid.traffic
    each = max(kernel.cycles / chip.clock, grid.traffic / chip.bandwidth)
    seconds += times * each
    found |= {
      f'{base}/ms': 1e3 * each,
      f'{base}/cycles': kernel.cycles,
      f'{base}/programs': grid.programs,
      f'{base}/traffic GB': grid.traffic / 1e9,
      f'{base}/MXU': kernel.busy['MXU'],
      f'{base}/spills': kernel.spills,
      f'{base}/VMEM MiB': kernel.vmem / 2**20,
    }
  return found | {
    'ms': 1e3 * (seconds + program.cycles / chip.clock),
    'kernels ms': 1e3 * seconds,
    'cycles': cycles,
    'traffic GB': traffic / 1e9,
    'launches': program.launches,
  }


def worsened(record: dict, case: Case, found: dict[str, float]) -> list[str]:
  """Returns what became 10 % worse than a record, a line for each figure."""
  lines = []
  for name, value in found.items():
    key = '/'.join((*case, name))
    old = record['figures'].get(key)
    if old is None:
      lines.append(f'{key} is not on record')
    elif name.endswith(GUARDED) and value > 1.1 * old:
      lines.append(
        f'{key} was {old:.4g}, is {value:.4g}: {value / old - 1:+.0%}'
      )
  if lines:
    lines.append(
      'If it must be, store new figures: python launch/bench.py --suite=static'
      f' --topology={record["topology"]} --only={shlex.quote(case.op)}'
    )
  return lines


def roofline(row, which: str, chip: Chip) -> float:
  """The least seconds of an op: every array moved once."""
  sizes = {
    name: math.prod(SIZES[x] for x in axes)
    * (4 if name in FLOAT32 | INT32 else 2)
    for name, axes in (row.arrays | {'out': row.out}).items()
  }
  moved = sum(sizes.values())
  flops = row.flops * math.prod(SIZES[x] for x in row.out[:3])
  if which == 'both':  # the arguments and the cotangent again, and gradients
    moved += 2 * sum(sizes.values()) - sizes['out']
    flops *= 3.5
  return max(flops / chip.flops, moved / chip.bandwidth)
