"""A training step of a model of 125M parameters on TPUs that are not there.

The trainer's step with AdamW in bfloat16, data parallel, 4 x 4096 tokens a
chip, is compiled for a topology; see `schedule` and `bundles` for what is read
of it. What is left outside the kernels is named by the lines it was lowered
from. Collectives are taken to hide behind the rest.

python launch/bench.py --suite=static_step --topology=v5e:2x4
"""

import collections
import functools
import json
import pathlib

import jax
from jax.experimental import topologies

from efficient_attn import config as configs
from efficient_attn import sharding
from efficient_attn.models import cost
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture
from efficient_attn.train.step import make_train_step
from experiments.benchmarks import bundles, grids, schedule, static
from experiments.benchmarks.static_ops import OPS
from experiments.benchmarks.training import LARGE

# The remat policy by pattern, the mixer of all layers: none where that fits.
ROWS = {
  'attention': 'none',
  'window': 'none',
  'mla': 'dots',
  'retention': 'dots',
  'gla': 'dots',
  'mamba2': 'dots',
  'gated_deltanet': 'dots',
  'kda': 'dots',
  'mamba': 'dots',
}
BATCH, LENGTH = 4, 4096  # of a chip
LARGEST = 10  # operations that are named
# Which does not depend on heads and batch.
CONDITIONS = {
  name: x for row in OPS.values() for name, x in row.conditions.items()
}


def measure(topology: str, rows: tuple[str, ...]) -> dict[str, float]:
  """Returns figures of the step by pattern: pattern/figure.

  Those named pattern/outside/operation are the milliseconds of the largest
  operations outside the kernels.
  """
  static.chip_of(topology)
  figures = {}
  work = functools.partial(figures_of, topology)
  for pattern, found in zip(rows, bundles.each(work, rows), strict=True):
    print(pattern, f'{found["ms"]:.1f} ms', flush=True)
    figures |= {f'{pattern}/{name}': value for name, value in found.items()}
  return figures


def figures_of(topology: str, folder: str, pattern: str) -> dict[str, float]:
  """Compiles a step in a process that dumps schedules to a folder."""
  chip = static.chip_of(topology)
  traced, flops = trace(topology, pattern)
  compiled = traced.lower().compile()
  program = schedule.read_program(compiled.as_text())
  called = grids.kernel_grids(traced.jaxpr)
  found = static.cost_of(program, called, folder, CONDITIONS, chip)
  memory = compiled.memory_analysis()
  outside = collections.Counter()
  for x in program.costs:
    outside[x.operation.source or x.operation.kind] += x.cycles
  return found | {
    'MFU': flops / (found['ms'] / 1e3) / chip.flops,
    'outside ms': 1e3 * program.cycles / chip.clock,
    'temporary GiB': memory.temp_size_in_bytes / 2**30,
    **{
      f'outside/{source}': 1e3 * cycles / chip.clock
      for source, cycles in outside.most_common(LARGEST)
    },
  }


def trace(topology: str, pattern: str) -> tuple[jax.stages.Traced, float]:
  """Returns the traced step, and the FLOPs of its products on each chip."""
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
  values = configs.override(LARGE, {
    'model.name': 'lm',
    'model.pattern': (pattern,),
    'model.remat': ROWS[pattern],
    'data.seq_len': LENGTH,
    'batch_size': BATCH * len(devices),
  })  # fmt: skip
  config = configs.resolve(values)
  mesh = sharding.make_mesh(f'data={len(devices)}', devices)
  architecture = Architecture(config.model)
  optimizer = architecture.optimizer(config)
  objective = make_objective(config)
  state = architecture.abstract_state(config, optimizer, mesh)
  rows = jax.NamedSharding(mesh, sharding.activation_spec(('batch', None)))
  shape = config.batch_size, config.data.seq_len + 1
  leaf = jax.ShapeDtypeStruct(shape, 'int32', sharding=rows)
  batch = dict(tokens=leaf, segment_ids=leaf)
  step = make_train_step(config, architecture, optimizer, objective)

  def forward(params, batch):
    return objective(architecture.merge(params), batch, None)

  with jax.set_mesh(mesh):
    try:  # three forward passes
      flops = 3 * cost.flops(forward, state.params, batch) / len(devices)
    except cost.UnknownLengthError:
      flops = float('nan')
    return jax.jit(step, donate_argnums=0).trace(state, batch), flops


COLUMNS = {
  'ms': 'ms',
  'MFU': 'MFU at most',
  'kernels ms': 'in kernels (ms)',
  'outside ms': 'outside (ms)',
  'traffic GB': 'memory traffic (GB)',
  'temporary GiB': 'temporaries (GiB)',
  'launches': 'launches',
}
HEAD = """\
# A training step of 125M parameters on TPUs, by the schedule of their compiler

12 layers of width 768, 12 heads of 64, a vocabulary of 50,304, AdamW, bfloat16,
4 x 4096 tokens a chip; no TPU ran. Written by

```sh
python launch/bench.py --suite=static_step --topology=v5e:2x4
```

A kernel takes max(cycles / clock, traffic / bandwidth); collectives are not
counted. The compiler estimates operations outside the kernels too slow where
arrays change their layout.
"""


def write_report(folder: pathlib.Path) -> None:
  """Writes README.md of all records in a folder."""
  lines = [HEAD]
  for path in sorted(folder.glob('*.json')):
    record = json.loads(path.read_text())
    by_pattern = {}
    for key, value in record['figures'].items():
      pattern, name = key.split('/', 1)
      by_pattern.setdefault(pattern, {})[name] = value
    versions = ', '.join(f'{k} {v}' for k, v in record['versions'].items())
    lines += [
      f'## {record["topology"]}',
      '',
      f'{record["date"]}, {versions}.',
      '',
      f'| pattern | remat | {" | ".join(COLUMNS.values())} |',
      '|' + '---|' * (2 + len(COLUMNS)),
    ]
    for pattern, found in by_pattern.items():
      cells = [pattern, ROWS[pattern]]
      cells += [f'{found[name]:.3g}' for name in COLUMNS]
      lines.append(f'| {" | ".join(cells)} |')
    for pattern, found in by_pattern.items():
      lines += ['', f'Outside the kernels of {pattern}:', '']
      lines += [
        f'- {value:.1f} ms: {name.removeprefix("outside/")}'
        for name, value in found.items()
        if name.startswith('outside/')
      ]
    lines.append('')
  (folder / 'README.md').write_text('\n'.join(lines))
