"""The sharded training step runs kernels on a TPU slice, without one."""

import jax
import pytest
from jax.experimental import topologies

from efficient_attn import config as configs
from efficient_attn import config_files, sharding
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture
from efficient_attn.train.step import make_train_step

pytest.importorskip('libtpu', reason="needs pip install 'efficient_attn[tpu]'")


@pytest.mark.parametrize('mixer', ['retention', 'hgrn2'])
def test_a_sharded_step_has_both_passes_of_the_kernel(mixer):
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x4'
  )
  values = configs.override(
    config_files.load('configs/lm/quickstart.py'),
    {
      'mesh': 'data=2,fsdp=2,tensor=2',
      'model.dtype': 'bfloat16',
      'model.pattern': f'("{mixer}",)',
    },
  )
  config = configs.resolve(values)
  mesh = sharding.make_mesh(config.mesh, topology.devices)
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
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
  # One layer of a scan over layers: a forward and a backward pass.
  assert lowered.as_text().count('tpu_custom_call') == 2
