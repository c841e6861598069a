"""Every mixer compiles for a TPU, with the kernels that README.md says."""

import functools

import pytest
from jax.experimental import topologies

from efficient_attn.layers.mixers import MIXERS
from experiments.benchmarks.lowered import kernels, lowered
from launch import table

pytest.importorskip('libtpu', reason="needs pip install 'efficient_attn[tpu]'")


@functools.cache
def device():
  return topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x2'
  ).devices[0]


@pytest.mark.in_turn
@pytest.mark.parametrize('name', MIXERS)
def test_compiles_for_v5e(name):
  program = lowered(name, device())
  stored = table.stored_kernels(table.README.read_text())
  assert table.kernel_cell(kernels(program)) == stored[name], (
    'run python launch/table.py'
  )
  program.compile()
