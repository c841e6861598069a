"""The operations of a program for a TPU, read from the compiler's own output.

No accelerator is needed: the compiler estimates the cycles of every operation
of a program, but for kernels, of which it dumps the final bundles (`bundles`).
A program is then the sum over its operations, those of a loop as often as it
turns.

The estimates are a model. Those of operations are pessimistic where arrays
change their layout, by up to 2x; bundles know nothing of waiting for memory,
and are optimistic by about 1.4x.
"""

import dataclasses
import math
import re

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'f64': 8}
KERNEL = 'custom_call_target="tpu_custom_call"'
SHAPE = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
# What computes or moves nothing by itself.
FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
  'after-all', 'iota', 'conditional', 'opt-barrier', 'partition-id',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
  """One instruction of a program."""

  name: str
  kind: str
  source: str  # the operation of jax, and its line
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
  computations, entry, lines = {}, None, _lines(text)
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
    called = re.findall(r'(calls|body|condition|to_apply)=%?([\w.-]+)', rest)
    turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    if turns:
      called.append(('turns', turns[1]))
    if KERNEL in rest:
      kind = 'kernel'
    head = rest.split('), ')[0]
    if kind == 'constant':
      called.append(('value', head.rstrip(')')))
    if kind == 'parameter':
      called.append(('index', head.rstrip(')')))
    current[name] = Operation(
      name=name,
      kind=kind,
      source=_source(rest, lines),
      results=_sizes(shape),
      operands=re.findall(r'%([\w.-]+)', head),
      cycles=int(cycles[1]) if cycles else 0,
      called=dict(called),
    )
  return computations, entry


def _lines(text):
  """By stack frame, the line of the source: layers/ffn.py:31."""
  tables = {}
  for title in ('FileNames', 'FileLocations', 'StackFrames'):
    table = re.search(rf'^{title}\n((?:\d+ .*\n)*)', text, re.MULTILINE)
    rows = table[1].splitlines() if table else []
    tables[title] = dict(row.split(' ', 1) for row in rows)
  names, places, frames = tables.values()
  found = {}
  for frame, row in frames.items():
    place = places[re.search(r'file_location_id=(\d+)', row)[1]]
    name = names[re.search(r'file_name_id=(\d+)', place)[1]].strip('"')
    name = re.sub(r'.*/(efficient_attn|site-packages)/', '', name)
    found[frame] = f'{name}:{re.search(r" line=([0-9]+)", place)[1]}'
  return found


def _source(rest, lines):
  name = re.search(r'op_name="([^"]*)"', rest)
  frame = re.search(r'stack_frame_id=(\d+)', rest)
  if not name:
    return ''
  parts = [lines.get(frame[1], '') if frame else '', name[1].split('/')[-1]]
  if 'rematted_computation' in name[1]:
    parts.append('(again)')
  elif 'transpose(' in name[1]:
    parts.append('(backward)')
  return ' '.join(filter(None, parts))


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
class Cost:
  """What an operation costs a program, all turns of its loops together."""

  operation: Operation
  times: int
  traffic: int  # bytes of the main memory read and written

  @property
  def cycles(self) -> int:
    """Cycles of all its turns."""
    return self.times * self.operation.cycles


@dataclasses.dataclass(frozen=True)
class Program:
  """What a compiled program costs.

  Attributes:
    costs: of its operations, kernels left out.
    kernels: its kernels, whose cycles and traffic are not here.
  """

  costs: list[Cost]
  kernels: list[Cost]

  @property
  def cycles(self) -> int:
    """Cycles of its operations."""
    return sum(cost.cycles for cost in self.costs)

  @property
  def traffic(self) -> int:
    """Bytes of the main memory that its operations read and write."""
    return sum(cost.traffic for cost in self.costs)

  @property
  def launches(self) -> int:
    """Operations and kernels, each turn of a loop counted."""
    return sum(x.times for x in self.costs + self.kernels)


def read_program(text: str) -> Program:
  """Sums up a compiled program, `compiled.as_text()`."""
  computations, entry = _parse(text)
  costs, kernels = [], []

  def visit(name, times):
    operations = computations[name]
    for op in operations.values():
      if op.kind == 'while':
        turns = op.called.get('turns')
        turns = turns or _turns(computations[op.called['condition']])
        visit(op.called['body'], times * int(turns))
      elif op.kind == 'call':
        visit(op.called['to_apply'], times)
      elif op.kind == 'kernel':
        kernels.append(Cost(op, times, 0))
      elif op.kind not in FREE and not op.kind.endswith('-done'):
        traffic = times * _traffic(op, operations, computations)
        costs.append(Cost(op, times, traffic))

  visit(entry, 1)
  return Program(costs, kernels)
