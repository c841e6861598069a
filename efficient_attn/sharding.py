"""Which mesh axis each logical axis lives on; the only file that says so.

The mesh always has the axes `data`, `fsdp` and `tensor` (of size 1 when not
asked for). Layers name the logical axes of their parameters and activations;
`RULES` maps the names to mesh axes. Parameters sharded on `fsdp` are gathered
where they are used, and their gradients scattered, because activations spend
`fsdp` on the batch. Ops never see the mesh: `local_op` runs them on the shards.
"""

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from efficient_attn.config import ConfigError
from efficient_attn.values import nearest

MESH_AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axes. A name that is not here is replicated.
RULES = {
  'batch': ('data', 'fsdp'),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'ffn': ('tensor',),
  'experts': ('fsdp',),
}


def parse_mesh(text: str) -> dict[str, int]:
  """Reads 'data=2,tensor=4'."""
  sizes = {}
  for part in filter(None, text.replace(' ', '').split(',')):
    name, _, size = part.partition('=')
    if name not in MESH_AXES:
      raise ConfigError(
        f'mesh={text!r}: unknown axis {name!r}; {nearest(name, MESH_AXES)}'
      )
    if not size.isdigit() or int(size) < 1:
      raise ConfigError(f'mesh={text!r}: {name} needs a size, as in {name}=2')
    sizes[name] = int(size)
  return sizes


def mesh_sizes(text: str, num_devices: int) -> dict[str, int]:
  """Returns the size of each axis; `data` takes the devices that are left."""
  sizes = parse_mesh(text)
  used = math.prod(sizes.values())
  if 'data' not in sizes:
    sizes['data'] = max(num_devices // used, 1)
    used *= sizes['data']
  if used != num_devices:
    raise ConfigError(
      f'mesh={text!r} uses {used} devices but there are {num_devices}'
    )
  return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def make_mesh(text: str = '', devices=None) -> jax.sharding.Mesh:
  """Returns an explicit mesh over `devices` (all by default)."""
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(text, len(devices))
  return jax.make_mesh(tuple(sizes.values()), MESH_AXES, devices=devices)


def platform(mesh: jax.sharding.Mesh | None = None) -> str:
  """Returns the platform that programs on `mesh` are compiled for.

  Without `mesh` that of the mesh in scope, else of this process. A mesh may be
  of devices that this process does not have.
  """
  if mesh is None:
    mesh = jax.sharding.get_abstract_mesh()
  device = mesh.abstract_mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def param_spec(names: tuple[str | None, ...]) -> P:
  """Returns where a parameter with these logical axes is stored."""
  return _spec(names, used=())


def activation_spec(names: tuple[str | None, ...]) -> P:
  """Returns the layout in computation, where `batch` owns its mesh axes."""
  return _spec(names, used=() if 'batch' in names else RULES['batch'])


def _spec(names, used):
  parts, used = [], set(used)
  for name in names:
    axes = tuple(a for a in RULES.get(name, ()) if a not in used)
    used.update(axes)
    parts.append(axes[0] if len(axes) == 1 else axes or None)
  return P(*parts)


def off_mesh() -> bool:
  """Whether nothing is to be laid out.

  No mesh is set, or not one of ours, or this is one shard of a `local_op`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.axis_names != MESH_AXES or bool(mesh.manual_axes)


def current(spec: P) -> P | None:
  """Returns `spec` under a mesh and None without one, for `out_sharding=`."""
  return None if off_mesh() else spec


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Lays `x` out for computation by its logical axes (no mesh: unchanged)."""
  if off_mesh():
    return x
  return jax.sharding.reshard(x, activation_spec(names))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
  """Lays `x` out as `other`, an array of as many axes (no mesh: unchanged)."""
  spec = jax.typeof(other).sharding.spec
  if off_mesh() or jax.typeof(x).sharding.spec == spec:
    return x
  return jax.sharding.reshard(x, spec)


def lookup(table: jax.Array, ids: jax.Array, *names: str | None) -> jax.Array:
  """Returns table[ids]; `names` are the logical axes of the result.

  The table is gathered on every device first.
  """
  gathered = constrain(table, *[None] * table.ndim)
  return gathered.at[ids].get(out_sharding=current(activation_spec(names)))


# The letters of array layouts that are sharded inside ops: 'BTNH'.
LETTERS = {'B': 'batch', 'N': 'heads', 'K': 'heads'}


def local_op(op: Callable, inputs: tuple, outputs, **named: str) -> Callable:
  """Wraps a single-device op so that it runs on each shard of its arguments.

  Args:
    op: a function of positional arrays (or pytrees of them, or None), and of
      options by keyword.
    inputs: the layout of each argument as letters, 'BTNH', where B is sharded
      as the batch and N (or K) as heads; for a pytree a function from an array
      leaf to its letters, a dict of letters, or a tree of them.
    outputs: the same for the results, as a pytree prefix; or a function from
      the shapes of the results to it.
    **named: the layouts of options that are arrays (or None, or a static int).

  Returns:
    A function of the same arguments: `op` itself without a mesh, else one
    `jax.shard_map` over the batch and the heads.
  """

  def spec(letters):
    return activation_spec(tuple(map(LETTERS.get, letters)))

  def lay_out(letters, arg):
    if isinstance(letters, dict):
      return {name: lay_out(letters[name], arg[name]) for name in arg}
    if isinstance(letters, str):
      letters = jax.tree.map(lambda _: letters, arg)
    elif callable(letters):
      letters = jax.tree.map(letters, arg)

    def leaf(x, chosen):
      return jax.sharding.reshard(x, spec(chosen))

    return jax.tree.map(leaf, arg, letters)

  @functools.wraps(op)
  def wrapped(*args, **options):
    if off_mesh():
      return op(*args, **options)
    traced = {
      name: letters
      for name, letters in named.items()
      if not isinstance(options.get(name), int)
    }
    static = {k: v for k, v in options.items() if k not in traced}

    def run(*args):
      *args, arrays = args
      return op(*args, **arrays, **static)

    args = (*args, {name: options.get(name) for name in traced})
    results = outputs
    if callable(outputs):
      shapes = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arg)
        for arg in args
      ]
      results = outputs(*jax.eval_shape(run, *shapes))
    args = [lay_out(i, a) for i, a in zip((*inputs, traced), args, strict=True)]
    out_specs = jax.tree.map(spec, results)
    return jax.shard_map(run, out_specs=out_specs, check_vma=False)(*args)

  return wrapped


def over_experts(
  op: Callable,
  tokens: tuple[jax.Array, ...],
  weights: dict[str, jax.Array],
  axes: dict[str, tuple[str | None, ...]],
) -> jax.Array:
  """Runs op(tokens, weights, first) where each device has some experts.

  Args:
    op: sees its experts, of which the first has the number `first`, and the
      tokens of all devices that have the others; returns what its experts and
      its part of the ffn add to each token, [B, T, D].
    tokens: arrays [B, T, ...].
    weights: arrays of experts [E, ...].
    axes: their logical axes.
  """
  if off_mesh():
    return op(tokens, weights, 0)
  (axis,), (partial,) = RULES['experts'], RULES['ffn']
  rows = activation_spec(('batch', None, None))
  weights = {
    name: jax.sharding.reshard(w, param_spec(axes[name]))
    for name, w in weights.items()
  }
  tokens = [jax.sharding.reshard(x, rows) for x in tokens]

  def run(tokens, weights):
    (count,) = {len(w) for w in weights.values()}
    tokens = [jax.lax.all_gather(x, axis, axis=0, tiled=True) for x in tokens]
    y = op(tokens, weights, jax.lax.axis_index(axis) * count)
    y = jax.lax.psum(y, partial)
    return jax.lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)

  return jax.shard_map(run, out_specs=rows, check_vma=False)(tokens, weights)
