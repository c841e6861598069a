"""Heads over the virtual devices of a CPU, as the trainer divides batches."""

import math

import jax

AUTO = jax.sharding.AxisType.Auto


def over_heads(arrays):
  """Lays arrays [B, T, N, ...] over the devices of a CPU, others over one.

  XLA divides small matmuls badly between cores: a device each is faster.
  """
  many = jax.device_count() if jax.default_backend() == 'cpu' else 1
  heads = [x.shape[2] for x in jax.tree.leaves(arrays) if x.ndim > 2]
  mesh = jax.make_mesh((math.gcd(many, *heads),), ('heads',), (AUTO,))

  def put(x):
    axes = (None, None, 'heads') if x.ndim > 2 else ()
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

  return jax.tree.map(put, arrays)
