"""What a model takes from the platform is that of its mesh, not of the host."""

import jax
import pytest

from efficient_attn import config as configs
from efficient_attn import models, sharding


def mesh_of(platform):
  """A mesh of one device that this host need not have."""
  device = jax.sharding.AbstractDevice(
    device_kind='any', num_cores=1, platform=platform
  )
  return jax.sharding.AbstractMesh(
    (1,) * len(sharding.MESH_AXES),
    sharding.MESH_AXES,
    abstract_device=device,
  )


@pytest.mark.parametrize(
  'platform,dtype',
  [('tpu', 'bfloat16'), ('gpu', 'bfloat16'), ('cpu', 'float32')],
)
def test_the_dtype_is_of_the_mesh(platform, dtype):
  config = configs.resolve({'model': {'name': 'lm'}}).model
  mesh = mesh_of(platform)
  assert models.with_dtype(config, mesh).dtype == dtype
  with jax.sharding.use_abstract_mesh(mesh):
    assert models.with_dtype(config).dtype == dtype
  host = models.with_dtype(config).dtype
  assert host == models.with_dtype(config, sharding.make_mesh()).dtype
