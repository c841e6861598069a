"""Arrays of the scan kernels: channels in lanes, and tokens in tiles of 8."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHUNK = 128  # tokens of a program, and between two saved states
TILE = 8  # tokens that are read and written together
LANES = 128
# The most channels that run side by side; more hide latency until they spill.
WIDTH = {'forward': 512, 'backward': 256}


class Sizes:
  """The sizes of a call, and its blocks over the grid (B, chunks).

  Args:
    x: [B, T, D].
    A: [S, D].
    backward: whether chunks run from the last to the first.
  """

  def __init__(self, x, A, backward=False):
    self.batch, self.length, self.channels = x.shape
    self.states_count = A.shape[0]
    self.chunks = -(-self.length // CHUNK)
    self.padded = (self.batch, self.chunks * CHUNK, self.channels)
    self._backward = backward

  def _chunk(self, j):
    return self.chunks - 1 - j if self._backward else j

  def pad(self, x):
    """[B, T, ...] to whole chunks; a dt of zero changes no state."""
    missing = self.padded[1] - self.length
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

  def columns(self, x):
    """[B, T, S] to [B, S, T], float32."""
    return jnp.swapaxes(self.pad(x.astype(jnp.float32)), 1, 2)

  def spread(self):
    """Scratch for a column of each token of a chunk, in all lanes."""
    return pltpu.VMEM((CHUNK, self.states_count, LANES), jnp.float32)

  def tokens(self):
    """Of [B, T, D]."""
    return pl.BlockSpec(
      (1, CHUNK, self.channels), lambda b, j, *_: (b, self._chunk(j), 0)
    )

  def by_token(self):
    """Of [B, S, T]."""
    return pl.BlockSpec(
      (1, self.states_count, CHUNK), lambda b, j, *_: (b, 0, self._chunk(j))
    )

  def shared(self):
    """Of [S, D]."""
    return pl.BlockSpec(
      (self.states_count, self.channels), lambda b, j, *_: (0, 0)
    )

  def state(self):
    """Of [B, S, D], one block for all chunks."""
    return pl.BlockSpec(
      (1, self.states_count, self.channels), lambda b, j, *_: (b, 0, 0)
    )

  def states(self):
    """Of [chunks, B, S, D]."""
    return pl.BlockSpec(
      (1, 1, self.states_count, self.channels),
      lambda b, j, *_: (self._chunk(j), b, 0, 0),
    )

  def call(self, kernel, inputs, starts, outputs, scratch, name, work,
           interpret):  # fmt: skip
    """Calls a kernel; `work` counts multiplications for each state."""
    scalars = []
    if starts is not None:
      scalars = [self.pad(starts.astype(jnp.int32)).reshape(-1)]
    arrays, in_specs = zip(*inputs, strict=True)
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes))
    states = self.batch * self.padded[1] * self.channels * self.states_count
    return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(self.batch, self.chunks),
        in_specs=in_specs,
        out_specs=[spec for *_, spec in outputs],
        scratch_shapes=scratch,
      ),
      out_shape=shapes,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'),
        vmem_limit_bytes=64 * 2**20,
      ),
      cost_estimate=pl.CostEstimate(
        flops=work * states, transcendentals=states, bytes_accessed=moved
      ),
      name=name,
      interpret=interpret,
    )(*scalars, *arrays)


def width_of(channels, stage):
  """Channels that run side by side: whole registers that divide all."""
  most = WIDTH[stage] // LANES
  return LANES * max(
    n for n in range(1, most + 1) if channels // LANES % n == 0
  )


def over_channels(channels, width, body):
  """Calls body(channels) for every group of `width` channels."""

  def group(i, _):
    body(pl.ds(pl.multiple_of(i * width, width), width))

  jax.lax.fori_loop(0, channels // width, group, None)


def across(column, width):
  """[S, 128] of equal lanes to [S, width]."""
  return column if width == LANES else jnp.tile(column, (1, width // LANES))


def spread_columns(refs, columns):
  """Puts each token's column [S, 1] of [S, C] in all lanes of [C, S, 128]."""
  for ref, column_ref in zip(refs, columns, strict=True):
    for t in range(CHUNK):
      column = ref[0, :, t : t + 1]
      column_ref[t] = jnp.broadcast_to(column, column_ref.shape[1:])


def gathered_columns(column_ref):
  """The sums of lanes of [C, S, 128], as [S, C]."""
  shape = column_ref.shape[1], CHUNK
  lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  found = jnp.zeros(shape, jnp.float32)
  for t in range(CHUNK):
    column = jnp.sum(column_ref[t], 1, keepdims=True)
    found = jnp.where(lane == t, column, found)
  return found


def row_of(tile, j):
  """Row j of a tile of tokens, [1, width]."""
  return tile[j : j + 1]


def sums_of_rows(parts):
  """Sums over rows of TILE arrays [S, width], as the rows of one [8, width]."""
  parts = [sum(jnp.split(x, x.shape[0] // TILE)) for x in parts]
  size = TILE // 2
  row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
  while len(parts) > 1:
    # The lower half of the rows of the one, and the upper half of the other.
    first, second = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    near = (row & size) == 0
    parts = [
      jnp.where(near, x, y) + _swapped(jnp.where(near, y, x), size)
      for x, y in zip(first, second, strict=True)
    ]
    size //= 2
  return parts[0]


def _swapped(x, size):
  """Swaps neighbouring groups of `size` rows of 8."""
  if size == TILE // 2:
    return pltpu.roll(x, size, 0)
  row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  up, down = pltpu.roll(x, TILE - size, 0), pltpu.roll(x, size, 0)
  return jnp.where((row & size) == 0, up, down)


def starter(starts_ref, chunk, chunks):
  """A function that says whether a segment begins at a token of the chunk."""
  first = (pl.program_id(0) * chunks + chunk) * CHUNK
  return lambda token: starts_ref[first + token] != 0


def lane_sums(x):
  """[S, width] to [S, 128], whose lanes are to be summed."""
  return sum(jnp.split(x, x.shape[1] // LANES, 1))
