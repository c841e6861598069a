"""A program is its operations and its kernels, one after the other."""

import pytest

from efficient_attn.config import ConfigError
from experiments.benchmarks import bundles, grids, schedule, static


def test_a_kernel_waits_for_its_memory_or_its_units(monkeypatch):
  dumped = {
    'fast.1': bundles.Kernel(100, {'MXU': 0.5}, 3, 2**20),
    'slow.2': bundles.Kernel(900, {'MXU': 0.5}, 3, 2**20),
  }
  monkeypatch.setattr(
    bundles, 'read_kernel', lambda folder, name, grid, conditions: dumped[name]
  )

  def cost(name, cycles, times, traffic):
    operation = schedule.Operation(name, '', '', [(8, True)], [], cycles, {})
    return schedule.Cost(operation, times, traffic)

  program = schedule.Program(
    [cost('a', 50, 2, 7)], [cost('fast.1', 0, 1, 0), cost('slow.2', 0, 4, 0)]
  )
  # A kernel without a name is known by its results.
  called = {'fast': grids.Grid(1, 400), (8,): grids.Grid(1, 400)}
  chip = static.Chip(clock=100.0, flops=1.0, bandwidth=100.0)
  found = static.cost_of(program, called, '', {}, chip)
  assert found['fast/ms'] == pytest.approx(4e3)  # by 400 bytes
  assert found['slow/ms'] == pytest.approx(9e3)  # by 900 cycles
  assert found['kernels ms'] == pytest.approx(4e3 + 4 * 9e3)
  assert found['ms'] == pytest.approx(1e3 + 4e3 + 4 * 9e3)
  assert found['traffic GB'] == pytest.approx((7 + 400 + 4 * 400) / 1e9)
  assert found['launches'] == 2 + 1 + 4


def test_the_roofline_counts_every_array_once():
  row = static.OPS['linear scalar']
  tokens, wide = 8 * 4096 * 16, 128 * 2
  memory = static.Chip(clock=1, flops=1e30, bandwidth=1.0)
  assert static.roofline(row, 'forward', memory) == tokens * (4 * wide + 4)
  assert static.roofline(row, 'both', memory) == tokens * (11 * wide + 12)
  compute = static.Chip(clock=1, flops=1.0, bandwidth=1e30)
  flops = tokens * (4 * 64 * 128 + 4 * 128**2)
  assert static.roofline(row, 'forward', compute) == flops
  assert static.roofline(row, 'both', compute) == 3.5 * flops


def test_an_unknown_chip_is_named():
  with pytest.raises(ConfigError, match="--topology='v9x' is unknown"):
    static.chip_of('v9x:2x2')
