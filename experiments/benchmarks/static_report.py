"""The table and the plots of the static suite, of the records in a folder."""

import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from experiments import page
from experiments.benchmarks.static_ops import OPS

TITLES = {'forward': 'forward', 'both': 'forward and backward'}
HEAD = """\
# Ops on TPUs, by the schedule of their compiler

Milliseconds of one chip at B8 T4096 N16 H128 in bfloat16, decoding at B8 N16 K4
H128 with a full cache of 4096 or (long) 32768 keys; no TPU ran. A kernel
takes max(cycles / clock, memory traffic / bandwidth): see
[static.py](../../static.py) for what is counted. In brackets the kernels alone,
without the operations around them, which the compiler estimates too slow where
arrays change their layout. Written by

```sh
python launch/bench.py --suite=static --topology=v5e:2x2
```

A peer that is not installed is measured by the same command, with --only and
--out, where it can be.
"""
COLUMNS = (
  'op', 'pass', 'XLA form', 'kernel', 'roofline', 'share of it',
  'peer', 'kernel / peer', 'traffic, XLA / kernel (GB)', 'MXU', 'spills',
  'VMEM (MiB)', 'launches, XLA / kernel',
)  # fmt: skip
KERNEL = 'pallas_tpu'


class Row(NamedTuple):
  """The figures of a pass of an op: by implementation, then by name."""

  op: str
  which: str
  figures: dict[str, dict[str, float]]


def rows_of(record: dict) -> Iterator[Row]:
  """Yields the passes of all ops of a record, in the order of `OPS`."""
  for op in OPS:
    for which in OPS[op].passes:
      found = {}
      for key, value in record['figures'].items():
        if key.startswith(f'{op}/{which}/'):
          implementation, what = key.split('/', 3)[2:]
          found.setdefault(implementation, {})[what] = value
      if found:
        yield Row(op, which, found)


def write_report(folder: pathlib.Path) -> None:
  """Writes README.md and a plot beside each record in a folder."""
  lines = [HEAD]
  for path in sorted(folder.glob('*.json')):
    record = json.loads(path.read_text())
    versions = ', '.join(f'{k} {v}' for k, v in record['versions'].items())
    rows = list(rows_of(record))
    draw(rows).savefig(path.with_suffix('.png'), dpi=120, facecolor='white')
    lines += [
      f'## {record["topology"]}',
      '',
      f'{record["date"]}, {versions}.',
      '',
      f'![Milliseconds by op]({path.stem}.png)',
      '',
      f'| {" | ".join(COLUMNS)} |',
      '|' + '---|' * len(COLUMNS),
      *(f'| {" | ".join(_cells(row, record["topology"]))} |' for row in rows),
      '',
    ]
  (folder / 'README.md').write_text('\n'.join(lines))


def _cells(row, topology):
  xla, kernel = row.figures.get('xla', {}), row.figures.get(KERNEL, {})
  ideal = row.figures['roofline']['ms']
  peer, ratio = _peers(row, topology, kernel)
  return [
    row.op,
    TITLES[row.which],
    f'{xla["ms"]:.{1 if xla["ms"] > 1 else 2}f}' if xla else '',
    f'{kernel["ms"]:.2f} ({kernel["kernels ms"]:.2f})' if kernel else '',
    f'{ideal:.2f}',
    f'{ideal / kernel["ms"]:.0%}' if kernel else '',
    peer,
    ratio,
    _both(xla, kernel, 'traffic GB', '{:.2f}'),
    _each(kernel, '/MXU', '{:.0%}'),
    _each(kernel, '/spills', '{:.0f}'),
    _each(kernel, '/VMEM MiB', '{:.1f}'),
    _both(xla, kernel, 'launches', '{:.0f}'),
  ]


def _peers(row, topology, kernel):
  """The cells of the peers: their milliseconds, and ours by theirs."""
  times, ratios = [], []
  for name, peer in OPS[row.op].peers.items():
    found = row.figures.get(name)
    if not found:
      times.append(f'{name}: {peer.missing(topology) or "not measured"}')
      continue
    times.append(f'{name} {found["ms"]:.2f} ({found["kernels ms"]:.2f})')
    if kernel:
      whole, alone = (kernel[x] / found[x] for x in ('ms', 'kernels ms'))
      ratios.append(f'{whole:.2f} ({alone:.2f})')
  return ', '.join(times), ', '.join(ratios)


def _both(xla, kernel, what, form):
  return ' / '.join(form.format(x[what]) for x in (xla, kernel) if x)


def _each(figures, what, form):
  """A figure of each kernel."""
  found = [x for name, x in figures.items() if name.endswith(what)]
  return ' / '.join(map(form.format, found))


def draw(rows: list[Row]):
  """Returns a figure: bars of all implementations, by op and pass."""
  made, axes = page.figure(8, 1.2 + 0.34 * len(rows))
  names = list(dict.fromkeys(x for row in rows for x in row.figures))
  names.remove('roofline')
  height = 0.8 / len(names)
  entries = {}
  for i, name in enumerate(names):
    bars = {
      place - 0.4 + height * (i + 0.5): row.figures[name]['ms']
      for place, row in enumerate(rows)
      if name in row.figures
    }
    entries[name] = axes.barh(
      list(bars), list(bars.values()), height, color=page.COLORS[i]
    )
  for place, row in enumerate(rows):
    ideal = row.figures['roofline']['ms']
    entries['roofline'] = axes.vlines(
      ideal, place - 0.45, place + 0.45, color='black', linewidth=2
    )
  axes.set_yticks(
    range(len(rows)), [f'{row.op}, {TITLES[row.which]}' for row in rows]
  )
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xscale('log')
  axes.xaxis.set_major_formatter('{x:g}')
  axes.set_axisbelow(True)
  axes.grid(False, axis='y')
  axes.set_xlabel('milliseconds')
  page.legend(axes, entries)
  return made
