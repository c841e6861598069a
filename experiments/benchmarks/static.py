"""Kernels against their XLA forms on a TPU that is not there.

Everything is compiled for a topology; see `schedule` for what is read of it.
A kernel takes max(cycles / clock, traffic / bandwidth); the cycles of an XLA
form have its traffic in them. Arrays stand as the kernels take them, so that
what is compared is the op and not the layout of a caller's arrays.

python launch/bench.py --suite=static --topology=v5e:2x2
"""

import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from efficient_attn import ops
from efficient_attn.kernels.additive import layout
from experiments.benchmarks import schedule


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
# B, T, N, H of the training shape.
SHAPE = (8, 4096, 16, 128)
GATES = ('scalar', 'channel')
PASSES = ('forward', 'both')
KERNEL = 'pallas_tpu'


def measure(topology: str) -> dict[str, float]:
  """Returns figures of every op, implementation and pass."""
  # The TPUs are not there: nothing looks for them, and both processes compile.
  os.environ |= dict(
    JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1'
  )
  jax.config.update('jax_platforms', 'cpu')
  cases = [(gate, which) for gate in GATES for which in PASSES]
  figures = {}
  # Apart, because dumping the schedules of an XLA form's hundred operations
  # takes minutes.
  apart = concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context('spawn')
  )
  with apart:
    forms = [apart.submit(_figures, topology, *case, 'xla') for case in cases]
    for case, form in zip(cases, forms, strict=True):
      figures |= _named(case, 'xla', form.result())
  folder = schedule.start_dump()
  try:
    for case in cases:
      found = _figures(topology, *case, KERNEL, folder)
      ideal = _roofline(*case, CHIPS[topology.split(':')[0]])
      figures |= _named(case, KERNEL, found | {'share': ideal / found['ms']})
      figures |= _named(case, 'roofline', {'ms': ideal})
  finally:
    shutil.rmtree(folder)
  return figures


def _named(case, implementation, found):
  return {
    ' '.join((*case, implementation, what)): x for what, x in found.items()
  }


def _figures(topology, gate, which, implementation, folder=None):
  chip = CHIPS[topology.split(':')[0]]
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ('chip',))
  place = jax.NamedSharding(mesh, jax.P())
  batch, length, heads, channels = SHAPE
  leaf = functools.partial(jax.ShapeDtypeStruct, sharding=place)
  x = leaf((batch, heads, length, channels), jnp.bfloat16)
  gates = (batch, heads, length) + (channels,) * (gate == 'channel')
  decay = leaf(gates, jnp.float32)

  def call(q, k, v, decay):
    q, k, v, decay = (jnp.swapaxes(y, 1, 2) for y in (q, k, v, decay))
    out, _ = ops.linear_attention(
      q,
      k,
      v,
      log_decay=decay,
      form='chunkwise',
      implementation=implementation,
    )
    return jnp.swapaxes(out, 1, 2)

  def both(q, k, v, decay, cotangent):
    out, pull = jax.vjp(call, q, k, v, decay)
    return out, pull(cotangent)

  if which == 'forward':
    lowered = jax.jit(call).lower(x, x, x, decay)
  else:
    lowered = jax.jit(both).lower(x, x, x, decay, x)
  compiled = lowered.compile()
  program = schedule.read_program(compiled.as_text())
  found = {
    'cycles': program.cycles,
    'traffic GB': program.traffic / 1e9,
    'launches': program.launches,
    'temporary MiB': compiled.memory_analysis().temp_size_in_bytes / 2**20,
  }
  compute = program.cycles / chip.clock
  if implementation != 'xla':
    for name, programs in _grids(gate, which).items():
      kernel = schedule.read_kernel(folder, name)
      found['cycles'] += kernel.cycles * programs
      found[f'{name} cycles'] = kernel.cycles * programs
      found[f'{name} MXU'] = kernel.busy['MXU']
      found[f'{name} spills'] = kernel.spills
    compute = found['cycles'] / chip.clock
    found['compute ms'] = 1e3 * compute
    compute = max(compute, program.traffic / chip.bandwidth)
  found['ms'] = 1e3 * compute
  return found


def _grids(gate, which):
  """The kernels of a pass, and the programs of each."""
  batch, length, heads, channels = SHAPE
  q = jax.ShapeDtypeStruct((batch, length, heads, channels), jnp.bfloat16)
  v = jax.ShapeDtypeStruct((batch, length, heads, 1, channels), jnp.bfloat16)
  grids = {}
  for stage in ('forward', 'backward')[: 1 + (which == 'both')]:
    sizes = layout.sizes_of(q, v, jnp.bfloat16, layout.HEADS[gate, stage])
    grids[f'{gate}_gate_{stage}'] = batch * sizes.programs * sizes.chunks
  return grids


def _roofline(gate, which, chip):
  """The least milliseconds: every array moved once, chunks of 64 tokens."""
  batch, length, heads, channels = SHAPE
  tokens = batch * length * heads
  decay = 4 * (channels if gate == 'channel' else 1)
  forward = 4 * 2 * channels + decay
  backward = 7 * 2 * channels + 2 * decay
  flops = tokens * (4 * 64 * channels + 4 * channels**2)
  moved = tokens * (forward + backward * (which == 'both'))
  if which == 'both':
    flops *= 3.5
  return 1e3 * max(flops / chip.flops, moved / chip.bandwidth)


def write_table(folder: pathlib.Path) -> None:
  """Writes README.md beside the results of all topologies in a folder."""
  lines = [
    '# Kernels by the schedule of the TPU compiler',
    '',
    'Milliseconds at B8 T4096 N16 H128 in bfloat16, of one chip; written by',
    '`python launch/bench.py --suite=static --topology=v5e:2x2`.',
    'No TPU ran: see `experiments/benchmarks/static.py` for what is counted.',
    '',
    '| topology | gate | pass | XLA form | kernel | roofline | share of it |'
    ' traffic, XLA / kernel (GB) | MXU | spills |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for path in sorted(folder.glob('*.json')):
    record = json.loads(path.read_text())
    for gate in GATES:
      for which in PASSES:
        case = f'{gate} {which}'
        get = {
          key.removeprefix(f'{case} '): value
          for key, value in record['figures'].items()
          if key.startswith(f'{case} ')
        }
        busy, spills = (
          ' / '.join(
            form.format(value)
            for key, value in get.items()
            if key.startswith(f'{KERNEL} ') and key.endswith(what)
          )
          for what, form in ((' MXU', '{:.0%}'), (' spills', '{:.0f}'))
        )
        cells = [
          record['topology'],
          gate,
          'forward' if which == 'forward' else 'forward and backward',
          f'{get["xla ms"]:.1f}',
          f'{get[f"{KERNEL} ms"]:.2f}',
          f'{get["roofline ms"]:.2f}',
          f'{get[f"{KERNEL} share"]:.0%}',
          f'{get["xla traffic GB"]:.1f} / {get[f"{KERNEL} traffic GB"]:.2f}',
          busy,
          spills,
        ]
        lines.append(f'| {" | ".join(cells)} |')
  (folder / 'README.md').write_text('\n'.join(lines) + '\n')
