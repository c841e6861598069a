"""Arrays of the additive kernels: heads before tokens, whole chunks.

The ops have [B, T, K, G, X], with G value heads to a query and key head. The
kernels read blocks of HEADS heads by CHUNK tokens, so that several independent
chains of products interleave in one program.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHUNK = 128  # tokens of a program, and between two saved states

# The most heads of a program by kernel and pass, of 128 channels and values in
# bfloat16. More hide latency, until they spill and take minutes to compile.
HEADS = {
  ('scalar', 'forward'): 16,
  ('scalar', 'backward'): 8,
  ('channel', 'forward'): 16,
  ('channel', 'backward'): 8,
}


class Sizes(NamedTuple):
  """The sizes of a call.

  Attributes:
    batch: B.
    length: T.
    kv_heads: query and key heads, K.
    group: value heads to each of them, G.
    channels: of queries and keys, H.
    width: of values, V.
    heads: value heads of a program.
    operand: dtype of the operands of matrix products.
  """

  batch: int
  length: int
  kv_heads: int
  group: int
  channels: int
  width: int
  heads: int
  operand: jnp.dtype

  @property
  def chunks(self) -> int:
    """The number of chunks of a sequence."""
    return -(-self.length // CHUNK)

  @property
  def programs(self) -> int:
    """The programs that share out the value heads."""
    return self.kv_heads * self.group // self.heads

  @property
  def shared(self) -> int:
    """Value heads of a program that read one query and key head."""
    return min(self.heads, self.group)

  @property
  def read(self) -> int:
    """Query and key heads of a program."""
    return self.heads // self.shared


def sizes_of(
  q: jax.Array, v: jax.Array, operand: jnp.dtype, most: int
) -> Sizes:
  """The sizes of q [B, T, K, H] and v [B, T, K, G, V]; `most` of HEADS."""
  batch, length, kv_heads, group, width = v.shape
  tiles = -(-q.shape[-1] // 128) * -(-width // 128)
  # A float32 product is made of six in bfloat16.
  parts = 1 if operand == jnp.bfloat16 else 4
  return Sizes(
    batch=batch,
    length=length,
    kv_heads=kv_heads,
    group=group,
    channels=q.shape[-1],
    width=width,
    heads=_heads(kv_heads, group, most // (tiles * parts)),
    operand=jnp.dtype(operand),
  )


def _heads(kv_heads, group, most):
  """Value heads of a program: whole groups, or a part of one."""
  return max(
    n
    for n in range(1, max(1, most) + 1)
    if (kv_heads * group) % n == 0 and (n % group == 0 or group % n == 0)
  )


def by_head(x: jax.Array, sizes: Sizes, dtype: jnp.dtype) -> jax.Array:
  """[B | 1, T, heads..., X] to [B, heads, chunks * CHUNK, X], with zeros."""
  x = x.astype(dtype).reshape(*x.shape[:2], -1, x.shape[-1])
  x = jnp.pad(
    jnp.swapaxes(x, 1, 2),
    [(0, 0), (0, 0), (0, sizes.chunks * CHUNK - sizes.length), (0, 0)],
  )
  return jnp.broadcast_to(x, (sizes.batch, *x.shape[1:]))


def by_token(x: jax.Array, like: jax.Array) -> jax.Array:
  """The inverse, [B, heads, chunks * CHUNK, X] to the shape of `like`."""
  x = jnp.swapaxes(x[:, :, : like.shape[1]], 1, 2)
  x = x.reshape(x.shape[0], *like.shape[1:])
  if like.shape[0] != x.shape[0]:
    x = jnp.sum(x, 0, keepdims=True)
  return x.astype(like.dtype)


def sum_parts(x: jax.Array, sizes: Sizes) -> jax.Array:
  """Gradients of keys [B, K * parts, T, H] to [B, K, T, H].

  Programs that share a key head each give a part.
  """
  if x.shape[1] == sizes.kv_heads:
    return x
  return jnp.sum(x.reshape(sizes.batch, sizes.kv_heads, -1, *x.shape[2:]), 2)


def by_program(x: jax.Array, sizes: Sizes) -> jax.Array:
  """[B, N, T] to rows [B, programs, chunks, heads, CHUNK]."""
  shape = (sizes.batch, sizes.programs, sizes.heads, sizes.chunks, CHUNK)
  return jnp.swapaxes(x.reshape(shape), 2, 3)


def from_programs(rows: jax.Array, sizes: Sizes) -> jax.Array:
  """The inverse, to [B, N, T]."""
  return jnp.swapaxes(rows, 2, 3).reshape(sizes.batch, -1, sizes.chunks * CHUNK)


class Blocks:
  """Block specifications over the grid (B, programs, chunks).

  Args:
    sizes: of the call.
    backward: whether chunks run from the last to the first.
  """

  def __init__(self, sizes: Sizes, *, backward: bool):
    self.sizes, self.backward = sizes, backward
    self.grid = (sizes.batch, sizes.programs, sizes.chunks)

  def _chunk(self, j):
    return self.sizes.chunks - 1 - j if self.backward else j

  def keys(self) -> pl.BlockSpec:
    """Of queries and keys [B, K, T, H]."""
    s = self.sizes
    parts = s.group // s.shared  # programs to a group
    return pl.BlockSpec(
      (1, s.read, CHUNK, s.channels),
      lambda b, n, j: (
        b,
        jax.lax.div(n, n.dtype.type(parts)),
        self._chunk(j),
        0,
      ),
    )

  def tokens(self, heads: int, width: int) -> pl.BlockSpec:
    """Of [B, programs * heads, T, width]."""
    return pl.BlockSpec(
      (1, heads, CHUNK, width), lambda b, n, j: (b, n, self._chunk(j), 0)
    )

  def key_parts(self, *arrays: jax.Array) -> list[tuple]:
    """Of gradients of keys, as outputs of `call`; see `sum_parts`."""
    s = self.sizes
    heads = s.programs * s.read
    return [
      (
        (s.batch, heads, s.chunks * CHUNK, s.channels),
        x.dtype if heads == s.kv_heads else jnp.float32,
        self.tokens(s.read, s.channels),
      )
      for x in arrays
    ]

  def tokens_of_row(self) -> pl.BlockSpec:
    """Of [B, 1, T, 1], the same for all heads."""
    return pl.BlockSpec(
      (1, 1, CHUNK, 1), lambda b, n, j: (b, 0, self._chunk(j), 0)
    )

  def rows(self, count: int) -> pl.BlockSpec:
    """Of rows [B, programs, chunks, count, CHUNK]."""
    return pl.BlockSpec(
      (1, 1, 1, count, CHUNK), lambda b, n, j: (b, n, self._chunk(j), 0, 0)
    )

  def columns(self, count: int) -> pl.BlockSpec:
    """Of columns [B, programs, T, count]."""
    return pl.BlockSpec(
      (1, 1, CHUNK, count), lambda b, n, j: (b, n, self._chunk(j), 0)
    )

  def state(self, shape: tuple[int, int]) -> pl.BlockSpec:
    """Of the first or the last state [B, N, *shape].

    One block for all chunks, so that a result is where the state lives until
    the last of them.
    """
    return pl.BlockSpec(
      (1, self.sizes.heads, *shape), lambda b, n, j: (b, n, 0, 0)
    )

  def whole(self) -> pl.BlockSpec:
    """Of an array that stays in the main memory."""
    return pl.BlockSpec(memory_space=pl.ANY)

  def states(self, shape: tuple[int, int]) -> pl.BlockSpec:
    """Of the states before every chunk [chunks, B, N, *shape]."""
    return pl.BlockSpec(
      (1, 1, self.sizes.heads, *shape),
      lambda b, n, j: (self._chunk(j), b, n, 0, 0),
    )


def load_state(state_ref: Any, block_ref: Any) -> None:
  """Copies a program's part of [B, N, ...] to its block, at its first chunk."""
  batch, program, chunk = map(pl.program_id, range(3))
  heads = block_ref.shape[1]

  @pl.when(chunk == 0)
  def _():
    rows = pl.ds(batch, 1), pl.ds(program * heads, heads)
    pltpu.sync_copy(state_ref.at[rows], block_ref)


def call(kernel, blocks: Blocks, inputs, outputs, *, name, **options):
  """Calls a kernel over the grid of `blocks`.

  Args:
    kernel: the body.
    blocks: the grid.
    inputs: pairs (array, block specification).
    outputs: triples (shape, dtype, block specification).
    name: of the kernel, in profiles.
    **options: interpret, and cost: multiply-adds and exponentials per token
      and head.
  """
  sizes = blocks.sizes
  multiplies, exponentials = options.pop('cost')
  tokens = math.prod(blocks.grid) * sizes.heads * CHUNK
  arrays, in_specs = zip(*inputs, strict=True)
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
  moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes))
  return pl.pallas_call(
    kernel,
    grid=blocks.grid,
    in_specs=in_specs,
    out_specs=[spec for *_, spec in outputs],
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * tokens * multiplies,
      transcendentals=tokens * exponentials,
      bytes_accessed=moved,
    ),
    name=name,
    **options,
  )(*arrays)


NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def products(operand: jnp.dtype):
  """A matrix product of operands of one dtype with float32 sums.

  A TPU multiplies bfloat16: float32 operands need several passes.
  """
  precision = None
  if operand == jnp.float32:
    precision = jax.lax.Precision.HIGHEST

  def dot(x, y, dims=NN):
    return jax.lax.dot_general(
      x.astype(operand),
      y.astype(operand),
      dims,
      precision=precision,
      preferred_element_type=jnp.float32,
    )

  return dot


iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (CHUNK, CHUNK))
