"""The schedule of a program for a TPU, read from the compiler's own output.

No accelerator is needed: the compiler estimates the cycles of every operation
of a program, and dumps the final bundles of every kernel. A program is then
the sum over its operations, those of a loop as often as it turns.

The estimates are a model. Those of operations are pessimistic where arrays
change their layout, by up to 2x; bundles know nothing of waiting for memory,
and are optimistic by about 1.4x.
"""

import dataclasses
import glob
import math
import os
import re
import tempfile

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'f64': 8}
SHAPE = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
# What computes or moves nothing by itself.
FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'after-all', 'iota', 'conditional', 'call', 'opt-barrier', 'partition-id',
}  # fmt: skip


def start_dump() -> str:
  """Makes the TPU compiler dump its schedules; before it is loaded.

  Returns:
    The folder of the dumps.
  """
  folder = tempfile.mkdtemp(prefix='schedules_')
  os.environ['LIBTPU_INIT_ARGS'] = (
    f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
  )
  return folder


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The schedule of one program of a kernel's grid.

  Attributes:
    cycles: bundles, those that wait included.
    busy: share of the cycles that each unit is busy, by its name.
    spills: vectors stored because there are too few registers.
  """

  cycles: int
  busy: dict[str, float]
  spills: int


def read_kernel(folder: str, name: str) -> Kernel:
  """Reads the schedule of the kernel `name` that was compiled last."""
  pattern = f'{folder}/*{name}*final_hlo-static-per-bundle-utilization.txt'
  path = max(glob.glob(pattern), key=os.path.getmtime)
  with open(path) as file:
    lines = file.read().split('\n')
  # The names of the units, how many there are of each, and what each bundle
  # uses of them.
  names = next(i for i, line in enumerate(lines) if line.startswith('MXU'))
  units = lines[names].split(', ')
  capacity = list(map(int, lines[names + 1].split()))
  begin = next(i for i, line in enumerate(lines) if 'UTILIZATION' in line)
  bundles = [list(map(int, x.split())) for x in lines[begin + 1 :] if x.strip()]
  used = dict(zip(units, map(sum, zip(*bundles, strict=True)), strict=True))
  stem = re.sub(r'-\d+-final_hlo.*', '', path.rsplit('/', 1)[1])
  stem = re.sub(r'^\d+-', '', stem)
  pattern = f'{folder}/*{stem}-*schedule-analysis_packed-bundles-post-ra.txt'
  with open(max(glob.glob(pattern), key=os.path.getmtime)) as file:
    cycles = int(re.search(r'total scheduled bundles:\s+(\d+)', file.read())[1])
  return Kernel(
    cycles=cycles,
    busy={
      unit: used[unit] / cycles / count
      for unit, count in zip(units, capacity, strict=True)
    },
    spills=used['VSTORE:SPILL'],
  )


@dataclasses.dataclass(frozen=True)
class Operation:
  """One instruction of a program."""

  name: str
  kind: str
  results: list[tuple[int, bool]]  # bytes, and whether in the main memory
  operands: list[str]
  cycles: int
  called: dict[str, str]


def _sizes(text):
  sizes = []
  for kind, dims, layout in SHAPE.findall(text):
    count = math.prod(map(int, filter(None, dims.split(','))))
    sizes.append((count * BYTES.get(kind, 4), 'S(1)' not in layout))
  return sizes


def _parse(text):
  """Computations by name, each its operations in order; and the entry."""
  computations, entry = {}, None
  for line in text.split('\n'):
    if line.endswith('{') and not line.startswith(' '):
      name = line.split('(')[0].replace('ENTRY', '').strip().lstrip('%')
      computations[name] = current = {}
      entry = name if line.startswith('ENTRY') else entry
      continue
    found = re.match(r'  (?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)', line)
    if not found:
      continue
    name, shape, kind, rest = found.groups()
    cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
    called = re.findall(r'(calls|body|condition)=%?([\w.-]+)', rest)
    head = rest.split('), ')[0]
    if kind == 'constant':
      called.append(('value', head.rstrip(')')))
    if kind == 'parameter':
      called.append(('index', head.rstrip(')')))
    current[name] = Operation(
      name=name,
      kind=kind,
      results=_sizes(shape),
      operands=re.findall(r'%([\w.-]+)', head),
      cycles=int(cycles[1]) if cycles else 0,
      called=dict(called),
    )
  return computations, entry


def _turns(condition):
  """How often a loop turns: the constant that its counter is compared with."""
  found = [
    int(op.called['value'])
    for op in condition.values()
    if op.kind == 'constant' and op.called['value'].isdigit()
  ]
  return max(found, default=1)


def _traffic(operation, operations, computations):
  """Bytes of the main memory that an operation reads and writes."""
  inner = computations.get(operation.called.get('calls'), {})
  total = 0
  for i, operand in enumerate(operation.operands):
    if operand not in operations:
      continue
    size = sum(n for n, main in operations[operand].results if main)
    total += min(size, _read(i, inner, size))
  size = sum(n for n, main in operation.results if main)
  updates = [op for op in inner.values() if op.kind == 'dynamic-update-slice']
  if updates:  # in place
    size = min(size, sum(_whole(inner, op.operands[1]) for op in updates))
  return total + size


def _read(index, inner, size):
  """What a fusion reads of an operand: less than all where it slices."""
  names = [
    op.name for op in inner.values() if op.called.get('index') == str(index)
  ]
  users = [op for op in inner.values() if set(names) & set(op.operands)]
  if not users:
    return size
  total = 0
  for op in users:
    if op.kind == 'dynamic-slice':
      total += sum(n for n, _ in op.results)
    elif op.kind != 'dynamic-update-slice' or op.operands[0] not in names:
      return size
  return total


def _whole(operations, name):
  return sum(n for n, _ in operations[name].results)


@dataclasses.dataclass(frozen=True)
class Program:
  """What a compiled program costs.

  Attributes:
    cycles: of its operations, kernels left out.
    traffic: bytes of the main memory read and written, kernels included.
    kernels: the names of its kernels.
    launches: operations and turns of loops.
  """

  cycles: int
  traffic: int
  kernels: tuple[str, ...]
  launches: int


def read_program(text: str) -> Program:
  """Sums up a compiled program, `compiled.as_text()`."""
  computations, entry = _parse(text)
  totals = dict(cycles=0, traffic=0, launches=0)
  kernels = []

  def visit(name, times):
    operations = computations[name]
    for op in operations.values():
      if op.kind == 'while':
        turns = _turns(computations[op.called['condition']])
        visit(op.called['body'], times * turns)
      if op.kind in FREE or op.kind.endswith('-done'):
        continue
      totals['cycles'] += times * op.cycles
      totals['launches'] += times
      totals['traffic'] += times * _traffic(op, operations, computations)
      if op.kind == 'custom-call' and op.cycles == 0 and '_' in op.name:
        kernels.append(op.name)

  visit(entry, 1)
  return Program(**totals, kernels=tuple(kernels))
