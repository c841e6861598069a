"""The schedule of a kernel, read from the final bundles of the TPU compiler.

A bundle takes a cycle. The text of a kernel has every bundle once: those of a
loop are counted as often as it turns, which is a constant of the schedule or
known of the traced kernel, and those behind a condition always, unless the
caller knows how often it holds. Waiting for memory is not in the bundles.
"""

import concurrent.futures
import dataclasses
import functools
import glob
import itertools
import math
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from efficient_attn import cli
from experiments.benchmarks.grids import Grid

BUNDLE = re.compile(r'^ *(?:0x)?[0-9a-f]+ +[A-Z]* *:[> ]*\{', re.MULTILINE)
BRANCH = re.compile(r'sbr\.rel (?:\(!?%(\w+)\) )?target = \$region(\d+)')
SLOTS = 4  # bundles after a branch that run before it is taken


def each(work: Callable, cases: Sequence) -> Iterator:
  """Yields work(folder, case) of every case, from processes that dump.

  The compiler is told where to dump when it is loaded, so other processes than
  this one compile. TPUs are not there, and nothing looks for them.
  """
  os.environ |= dict(
    JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1'
  )
  with (
    tempfile.TemporaryDirectory(prefix='schedules_') as folder,
    concurrent.futures.ProcessPoolExecutor(
      min(len(cases), cli.count_cores()),
      multiprocessing.get_context('spawn'),
      _start_dump,
      (folder,),
    ) as pool,
  ):
    yield from pool.map(functools.partial(work, folder), cases)


def _start_dump(folder):
  # A program that is found in a cache is not compiled, and dumps nothing.
  jax.config.update('jax_enable_compilation_cache', False)
  os.environ['LIBTPU_INIT_ARGS'] = (
    f'--xla_jf_dump_to={_own(folder)} --xla_jf_dump_llo_text=true'
    ' --xla_jf_dump_llo_pass_label_regex=final'
  )


def _own(folder):
  """Where this process dumps."""
  return os.path.join(folder, str(os.getpid()))


class Region(NamedTuple):
  """Bundles [begin, end) that run `turns` times; None is not known."""

  begin: int
  end: int
  turns: float | None
  kind: str  # grid, loop or condition


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The schedule of all programs of a kernel's grid.

  Attributes:
    cycles: bundles, those that wait included.
    busy: share of the cycles that each unit is busy, by its name.
    spills: vector stores of the text because there are too few registers.
    vmem: bytes of VMEM, both buffers of every block included.
  """

  cycles: float
  busy: dict[str, float]
  spills: int
  vmem: int


def read_kernel(
  folder: str,
  name: str,
  grid: Grid,
  conditions: tuple[float, ...] = (),
) -> Kernel:
  """Reads the schedule of a kernel that was compiled last.

  Args:
    folder: of the dumps, as `each` gives it to this process.
    name: of the instruction in the compiled program.
    grid: of the kernel.
    conditions: how often those of most bundles hold, in each program or turn
      of the loop around them, in the mean; in the order of the text. Others
      always hold.

  Returns:
    Its schedule.

  Raises:
    ValueError: schedule and grid have other loops.
  """
  bundles = _dump(folder, name, 'final_bundles')
  weights = _weights(regions(bundles), name, grid, conditions)
  units, capacity, used = _utilisation(
    _dump(folder, name, 'final_hlo-static-per-bundle-utilization')
  )
  cycles = sum(weights)
  return Kernel(
    cycles=cycles,
    busy={
      unit: sum(w * n for w, n in zip(weights, column, strict=False))
      / (cycles * count)
      for unit, count, column in zip(units, capacity, used, strict=True)
    },
    spills=sum(used[units.index('VSTORE:SPILL')]),
    vmem=sum(
      int(size, 16)
      for size in re.findall(
        r'space=vmem, size = (0x[0-9a-f]+)',
        _dump(folder, name, 'pre-finalize-registers-and-allocations'),
      )
    ),
  )


def _dump(folder, name, kind):
  """The text of the newest dump; equal kernels share that of one of them."""
  stem = re.sub(r'\.\d+$', '', name)
  for names in (name, f'{stem}.*', stem):
    found = glob.glob(f'{_own(folder)}/*-{names}-[0-9][0-9]-{kind}.txt')
    if found:
      with open(max(found, key=os.path.getmtime)) as file:
        return file.read()
  raise FileNotFoundError(
    f'{_own(folder)} has no {kind} of the kernel {name!r}'
  )


def _utilisation(text):
  """Names of the units, how many of each, and their uses by bundle."""
  lines = text.split('\n')
  names = next(i for i, line in enumerate(lines) if line.startswith('MXU'))
  begin = next(i for i, line in enumerate(lines) if 'UTILIZATION' in line)
  rows = [list(map(int, x.split())) for x in lines[begin + 1 :] if x.strip()]
  return (
    lines[names].split(', '),
    list(map(int, lines[names + 1].split())),
    list(zip(*rows, strict=True)),
  )


def regions(text: str) -> tuple[int, list[Region]]:
  """Returns the number of bundles and the loops and conditions among them."""
  begins = [mark.start() for mark in BUNDLE.finditer(text)]
  bodies = [text[i:j] for i, j in itertools.pairwise([*begins, len(text)])]
  labels = {
    label: i
    for i, body in enumerate(bodies)
    for label in re.findall(r'(?:Start|empty) region (\d+)', body)
  }
  found = []
  for i, body in enumerate(bodies):
    for predicate, label in BRANCH.findall(body):
      target = labels.get(label, i)
      if target > i:
        found.append(Region(i + 1, target, None, 'condition'))
      elif target < i:
        grid = 'iteration index' in bodies[target]
        turns = _constant_turns(bodies[target : i + 1], predicate)
        end = min(i + 1 + SLOTS, len(bodies))
        found.append(Region(target, end, turns, 'grid' if grid else 'loop'))
  return len(bodies), sorted(found, key=lambda x: (x.begin, -x.end))


def _constant_turns(bodies, predicate):
  """How often a loop turns from 0 to a constant bound, or None."""
  text = ''.join(bodies)
  only = r'(?:\([^)]*\), )?'  # behind an inner loop, when that has ended
  test = re.search(
    rf'%{predicate} = scmp\.\w+\.s32\.totalorder {only}%(\w+), (\d+)\b', text
  )
  if not test:
    return None
  step = re.search(rf'%{test[1]} = sadd\.s32 {only}(\d+), ', text)
  return math.ceil(int(test[2]) / int(step[1] if step else 1))


def _weights(found, name, grid, conditions):
  """How often every bundle runs, all programs together."""
  count, found = found
  loops = [x for x in found if x.kind == 'loop' and x.turns is None]
  held = _largest(count, found, len(conditions))
  if len(loops) != len(grid.loops) or None in grid.loops:
    raise ValueError(
      f'kernel {name!r}: its schedule has {len(loops)} loops of unknown turns,'
      f' the traced kernel {grid.loops}'
    )
  if len(held) != len(conditions):
    raise ValueError(
      f'kernel {name!r} has {len(held)} conditions, not {len(conditions)}'
    )
  for x in found:
    # Blocks are read a program ahead and written one behind.
    if x.kind == 'grid' and x.turns not in range(
      grid.programs, grid.programs + 3
    ):
      raise ValueError(
        f'kernel {name!r}: {x.turns} turns cannot be {grid.programs} programs'
      )
  times = dict(zip(loops + held, grid.loops + conditions, strict=True))

  def turns(x):
    return grid.programs if x.kind == 'grid' else times.get(x, x.turns or 1)

  return _multiplied(count, found, turns)


def _multiplied(count, found, times):
  weights = [1.0] * count
  for region in found:
    for i in range(region.begin, region.end):
      weights[i] *= times(region)
  return weights


def _largest(count, found, number):
  """The conditions of most bundles."""
  weights = _multiplied(
    count, found, lambda x: 1 if x.kind == 'grid' else x.turns or 1
  )
  held = [x for x in found if x.kind == 'condition']
  # The largest asks if there is a program at all in this turn of the grid.
  if held and any(x.kind == 'grid' for x in found):
    held.remove(max(held, key=lambda x: x.end - x.begin))
  held = [x for x in held if not _guard(x, found)]
  held.sort(key=lambda x: sum(weights[x.begin : x.end]), reverse=True)
  return sorted(held[:number])


def _guard(condition, found):
  """Whether a condition only asks if the loop in it turns at all."""
  return any(
    x.kind == 'loop'
    and condition.begin <= x.begin
    and x.end <= condition.end
    and x.end - x.begin >= 0.9 * (condition.end - condition.begin)
    for x in found
  )
