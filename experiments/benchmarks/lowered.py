"""One layer of a mixer as a program for TPUs, which need not be there."""

import re

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.context import Context
from efficient_attn.layers.mixer import OnGrid
from efficient_attn.layers.mixers import MIXERS, build_mixer

BATCH, LENGTH, HEADS, CHANNELS = 1, 256, 4, 64
# For the mixers that need one: of an image, or of a video.
GRID = 16, 16
GRIDS = {'vsa': (4, 8, 8)}
V5E = jax.sharding.AbstractMesh(
  (1,),
  ('chip',),
  abstract_device=jax.sharding.AbstractDevice(
    device_kind='TPU v5 lite', num_cores=1, platform='tpu'
  ),
)


def lowered(name: str, device: jax.Device | None = None) -> jax.stages.Lowered:
  """Lowers a forward and a backward pass in bfloat16, with default options.

  Args:
    name: of the row of `MIXERS`; a decoder's where it can be one.
    device: a TPU, of a topology too, to compile for; None: a v5e, and the
      program cannot be compiled.
  """
  width = HEADS * CHANNELS

  def build():
    return build_mixer(
      name,
      d_model=width,
      num_heads=HEADS,
      causal=MIXERS[name].causal,
      rngs=nnx.Rngs(0),
    )

  mixer = nnx.eval_shape(build)
  grid = GRIDS.get(name, GRID) if isinstance(mixer, OnGrid) else ()
  context = Context(grid=grid)
  graphdef, params = nnx.split(mixer)

  def train(params, x):
    def forward(params, x):
      return nnx.merge(graphdef, params)(x, context)[0]

    y, pull = jax.vjp(forward, params, x)
    return y, pull(y)

  x = jax.ShapeDtypeStruct((BATCH, LENGTH, width), jnp.bfloat16)
  if device is None:
    with jax.sharding.use_abstract_mesh(V5E):
      traced = jax.jit(train).trace(params, x)
      return traced.lower(lowering_platforms=('tpu',))
  place = jax.sharding.SingleDeviceSharding(device)

  def placed(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

  return jax.jit(train).lower(*jax.tree.map(placed, (params, x)))


def kernels(program: jax.stages.Lowered) -> tuple[str, ...]:
  """Returns the names of the Pallas kernels in a program."""
  return tuple(
    sorted(set(re.findall(r'kernel_name = "([^"]*)"', program.as_text())))
  )
