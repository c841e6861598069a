"""Arrays of channels that recur on their own: [B, G, T, W].

W channels in lanes and G groups of them. Where a head has whole registers of
channels the groups are heads, so that they lie as in the matrix kernels; else
there is one group of all channels, filled up to whole registers. Tokens are
the rows of tiles of 8, a part of the channels side by side, [groups, 8, lanes];
tiles and chunks of 128 tokens follow each other.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHUNK = 128  # tokens of a program, and between two saved states
TILE = 8  # tokens that are composed with each other
LANES = 128
TILES = CHUNK // TILE


def by_group(x: jax.Array) -> jax.Array:
  """[B, T, N, H] to [B, G, T, W]."""
  if x.shape[-1] % LANES == 0:
    return jnp.swapaxes(x, 1, 2)
  return _whole(x.reshape(x.shape[0], 1, x.shape[1], -1))


def _whole(x):
  """Fills up the last axis to whole registers."""
  missing = -x.shape[-1] % LANES
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def by_token(x: jax.Array, like: jax.Array) -> jax.Array:
  """The inverse, to shape and dtype of `like`; sums over B where it is 1."""
  batch, length, *channels = like.shape
  x = jnp.swapaxes(x[:, :, :length], 1, 2)
  x = _cut(x, tuple(channels))
  if batch != x.shape[0]:
    x = jnp.sum(x, 0, keepdims=True)
  return x.astype(like.dtype)


def _cut(x, channels):
  """[..., G, W] to [..., N, H]."""
  x = x.reshape(*x.shape[:-2], -1)
  return x[..., : math.prod(channels)].reshape(*x.shape[:-1], *channels)


def of_group(state: jax.Array) -> jax.Array:
  """States [..., N, H] to [..., G, 1, W]."""
  *batch, heads, channels = state.shape
  if channels % LANES == 0:
    return state[..., None, :]
  return _whole(state.reshape(*batch, 1, 1, heads * channels))


def of_head(state: jax.Array, channels: tuple[int, int]) -> jax.Array:
  """The inverse, to [..., *channels]."""
  return _cut(state[..., 0, :], channels)


class Blocks:
  """Blocks over the grid (B, chunks).

  Args:
    x: [B, G, T, W].
    backward: whether chunks run from the last to the first.
  """

  def __init__(self, x: jax.Array, *, backward: bool):
    self.batch, self.groups, self.length, self.width = x.shape
    self.chunks = -(-self.length // CHUNK)
    self.padded = (self.batch, self.groups, self.chunks * CHUNK, self.width)
    self._backward = backward

  def _chunk(self, j):
    return self.chunks - 1 - j if self._backward else j

  def tokens(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
    """Of [B | 1, G | 1, T, W | 1], and that in whole chunks, of zeros."""
    batch, groups, length, width = x.shape
    missing = self.padded[2] - length
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))), pl.BlockSpec(
      (1, groups, CHUNK, width),
      lambda b, j: (b if batch == self.batch else 0, 0, self._chunk(j), 0),
    )

  def results(self, dtype: jnp.dtype) -> tuple:
    """Of [B, G, T, W], as an output of `call`."""
    spec = pl.BlockSpec(
      (1, self.groups, CHUNK, self.width),
      lambda b, j: (b, 0, self._chunk(j), 0),
    )
    return self.padded, dtype, spec

  def constants(self) -> pl.BlockSpec:
    """Of [G, 1, W]."""
    return pl.BlockSpec((self.groups, 1, self.width), lambda b, j: (0, 0, 0))

  def state(self) -> pl.BlockSpec:
    """Of [B, G, 1, W], one block for all chunks."""
    return pl.BlockSpec(
      (1, self.groups, 1, self.width), lambda b, j: (b, 0, 0, 0)
    )

  def states(self) -> pl.BlockSpec:
    """Of [chunks, B, G, 1, W]."""
    return pl.BlockSpec(
      (1, 1, self.groups, 1, self.width),
      lambda b, j: (self._chunk(j), b, 0, 0, 0),
    )

  def parts(self, lanes: int) -> tuple[int, int]:
    """Groups and channels that run side by side, about `lanes` in all."""
    tiles = self.width // LANES
    width = max(n for n in range(1, lanes // LANES + 1) if tiles % n == 0)
    most = lanes // (LANES * width)
    groups = max(n for n in range(1, most + 1) if self.groups % n == 0)
    return groups, width * LANES

  def call(self, kernel, inputs, outputs, scratch, *, lanes, name, work,
           interpret):  # fmt: skip
    """Calls kernel(parts, *refs); `work` counts operations for each channel."""
    arrays, in_specs = zip(*inputs, strict=True)
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes))
    count = self.batch * self.groups * self.padded[2] * self.width
    groups, width = self.parts(lanes)

    def body(*refs):
      kernel(_Parts(self, groups, width), *refs)

    return pl.pallas_call(
      body,
      grid=(self.batch, self.chunks),
      in_specs=in_specs,
      out_specs=[spec for *_, spec in outputs],
      out_shape=shapes,
      scratch_shapes=[
        pltpu.VMEM((groups, CHUNK, width), jnp.float32) for _ in range(scratch)
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'),
        vmem_limit_bytes=64 * 2**20,
      ),
      cost_estimate=pl.CostEstimate(
        flops=work * count, transcendentals=count, bytes_accessed=moved
      ),
      name=name,
      interpret=interpret,
    )(*arrays)


class _Parts:
  """The parts of the channels of a program."""

  def __init__(self, blocks, groups, width):
    self._groups, self._width = groups, width
    self._turns = blocks.width // width
    self._count = self._turns * blocks.groups // groups

  def each(self, body):
    """Calls body(part) for every `Part`."""

    def turn(i, _):
      group = jax.lax.div(i, self._turns)
      lane = (i - group * self._turns) * self._width
      body(
        Part(
          pl.ds(group * self._groups, self._groups),
          pl.ds(pl.multiple_of(lane, self._width), self._width),
        )
      )

    jax.lax.fori_loop(0, self._count, turn, None)


class Part:
  """Some of the channels of a program, of G and W."""

  def __init__(self, groups, lanes):
    self.constant = groups, slice(None), lanes
    self.state = 0, *self.constant
    self.states = 0, *self.state
    self._groups, self._lanes = groups, lanes

  def tile(self, i):
    """Of tokens, tile i."""
    return 0, self._groups, rows(i), self._lanes


def rows(i):
  """The tokens of tile i."""
  return pl.ds(pl.multiple_of(i * TILE, TILE), TILE)


def over_tiles(body, carry, *, reverse=False):
  """Calls body(i, carry) for the tiles of a chunk; returns the last carry."""

  def turn(i, carry):
    return body(TILES - 1 - i if reverse else i, carry)

  return jax.lax.fori_loop(0, TILES, turn, carry)


def kept(decay, x):
  """Decays x; a decay of 0 forgets NaN and infinities too."""
  return decay * jnp.where(decay == 0, 0, x)


def _row(x):
  return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)


def neighbours(x, size, outside, *, reverse):
  """The tokens `size` before those of a tile, or after them if `reverse`.

  Args:
    x: [groups, 8, lanes].
    size: up to 7.
    outside: what stands for those of other tiles.
    reverse: which way to look.
  """
  there = _row(x) < TILE - size if reverse else _row(x) >= size
  moved = pltpu.roll(x, TILE - size if reverse else size, 1)
  return jnp.where(there, moved, outside)


def composed(decay, sums, *, reverse):
  """Composes the tokens of a tile up to and with each.

  Token t maps a state s to decay_t s + x_t, for each x of `sums`: one after the
  other, or the last one first if `reverse`.
  """
  size = 1
  while size < TILE:
    sums = [
      x + kept(decay, neighbours(x, size, 0, reverse=reverse)) for x in sums
    ]
    decay = kept(decay, neighbours(decay, size, 1, reverse=reverse))
    size *= 2
  return decay, sums
