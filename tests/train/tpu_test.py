"""The sharded training step compiles for a TPU slice, without one."""

import dataclasses

import jax
import pytest
from jax.experimental import topologies

from efficient_attn import config as configs
from efficient_attn import config_files, sharding
from efficient_attn.models import with_dtype
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture
from efficient_attn.train.step import make_train_step

pytest.importorskip('libtpu', reason="needs pip install 'efficient_attn[tpu]'")


def lowered_step(**changes):
  """Returns the lowered step for v5e:2x4."""
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x4'
  )
  values = configs.override(
    config_files.load('configs/lm/quickstart.py'),
    changes,
  )
  config = configs.resolve(values)
  mesh = sharding.make_mesh(config.mesh, topology.devices)
  config = dataclasses.replace(config, model=with_dtype(config.model, mesh))
  assert config.model.dtype == 'bfloat16'  # of the chips, not of this host
  architecture = Architecture(config.model)
  optimizer = architecture.optimizer(config)
  state = architecture.abstract_state(config, optimizer, mesh)
  rows = jax.NamedSharding(mesh, sharding.activation_spec(('batch', None)))
  shape = (config.batch_size, config.data.seq_len + 1)
  leaf = jax.ShapeDtypeStruct(shape, 'int32', sharding=rows)
  batch = dict(tokens=leaf, segment_ids=leaf, positions=leaf)
  step = make_train_step(
    config, architecture, optimizer, make_objective(config)
  )
  with jax.set_mesh(mesh):
    return jax.jit(step, donate_argnums=0).lower(state, batch)


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'mesh,collectives',
  [
    pytest.param('data=8', ['all-reduce'], marks=pytest.mark.exhaustive),
    ('data=2,fsdp=2,tensor=2', ['all-gather', 'all-reduce']),
  ],
)
def test_quickstart_compiles_for_v5e(mesh, collectives):
  compiled = lowered_step(mesh=mesh).compile()
  text = compiled.as_text()
  assert all(name in text for name in collectives)
  # Donation: the new state takes the place of the old one.
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes


@pytest.mark.parametrize('mixer', ['retention', 'hgrn2', 'attention'])
def test_a_sharded_step_has_both_passes_of_the_kernel(mixer):
  changes = {
    'mesh': 'data=2,fsdp=2,tensor=2',
    'model.pattern': f'("{mixer}",)',
    'data.seq_len': 1024,
  }
  text = lowered_step(**changes).as_text()
  # One layer of a scan over layers: a forward and a backward pass.
  assert text.count('tpu_custom_call') == 2
