"""h_t[s] = e^(dt_t A[s]) h_{t-1}[s] + dt_t x_t B_t[s], y_t = sum_s C_t[s] h_t.

The selective scan of Mamba (Gu and Dao 2312.00752): S numbers for each of many
channels, one token after another. Channels lie in lanes and states in rows, so
that a token is a few operations on [S, channels], with the state in registers;
chunks of 128 tokens follow each other, the state in VMEM. The backward pass
computes the states of a chunk again from the one before it, keeps them in VMEM,
and goes back over its tokens:

  dh <- dh + C_t dy_t           dC_t = sum_channels h_t dy_t
  dB_t = sum_channels dh dt x   du = sum_s dh B_t            (u = dt x)
  e = dh e^(dt A) h_{t-1}       d(dt) = x du + sum_s A e     dA += dt e
  dh <- e^(dt A) dh
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHUNK = 128  # tokens of a program, and between two saved states
TILE = 8  # tokens that are read and written together
LANES = 128
# The most channels that run side by side; more hide latency until they spill.
WIDTH = {'forward': 512, 'backward': 256}


@functools.partial(jax.jit, static_argnames=('dtype', 'save', 'interpret'))
def forward(x, dt, A, B, C, state, starts, *, dtype, save, interpret):
  """The outputs and the last state.

  Args:
    x: [B, T, D].
    dt: [B, T, D].
    A: [S, D], float32.
    B: [B, T, S].
    C: [B, T, S].
    state: before token 0, [B, S, D], float32.
    starts: [B, T], whether a segment begins, or None.
    dtype: of the outputs.
    save: whether to return the states before every chunk.
    interpret: see `pl.pallas_call`.

  Returns:
    y [B, T, D], the last state and, if `save`, the states [chunks, B, S, D].
  """
  sizes = _Sizes(x, A)
  tokens = sizes.tokens()
  outputs = [
    (sizes.padded, dtype, tokens),
    (state.shape, jnp.float32, sizes.state()),
    ((sizes.chunks, *state.shape), jnp.float32, sizes.states()),
  ]
  y, last, *states = sizes.call(
    functools.partial(_forward, segments=starts is not None),
    [
      (sizes.pad(x), tokens),
      (sizes.pad(dt), tokens),
      (A, sizes.shared()),
      (sizes.columns(B), sizes.by_token()),
      (sizes.columns(C), sizes.by_token()),
      (state, sizes.state()),
    ],
    starts,
    outputs if save else outputs[:2],
    [sizes.spread()] * 2,
    'selective_scan_forward',
    6,
    interpret,
  )
  return y[:, : sizes.length], last, *states


class _Sizes:
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


def _width(channels, stage):
  """Channels that run side by side: whole registers that divide all."""
  most = WIDTH[stage] // LANES
  return LANES * max(
    n for n in range(1, most + 1) if channels // LANES % n == 0
  )


def _over(channels, width, body):
  """Calls body(channels) for every group of `width` channels."""

  def group(i, _):
    body(pl.ds(pl.multiple_of(i * width, width), width))

  jax.lax.fori_loop(0, channels // width, group, None)


def _across(column, width):
  """[S, 128] of equal lanes to [S, width]."""
  return column if width == LANES else jnp.tile(column, (1, width // LANES))


def _spread(refs, columns):
  """Puts each token's column [S, 1] of [S, C] in all lanes of [C, S, 128]."""
  for ref, column_ref in zip(refs, columns, strict=True):
    for t in range(CHUNK):
      column = ref[0, :, t : t + 1]
      column_ref[t] = jnp.broadcast_to(column, column_ref.shape[1:])


def _gathered(column_ref):
  """The sums of lanes of [C, S, 128], as [S, C]."""
  shape = column_ref.shape[1], CHUNK
  lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  found = jnp.zeros(shape, jnp.float32)
  for t in range(CHUNK):
    column = jnp.sum(column_ref[t], 1, keepdims=True)
    found = jnp.where(lane == t, column, found)
  return found


def _rows(tile, j):
  """Row j of a tile of tokens, [1, width]."""
  return tile[j : j + 1]


def _sums_of_rows(parts):
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


def _starter(starts_ref, chunk, chunks):
  """A function that says whether a segment begins at a token of the chunk."""
  first = (pl.program_id(0) * chunks + chunk) * CHUNK
  return lambda token: starts_ref[first + token] != 0


def _forward(*refs, segments):
  starts_ref, refs = (refs[0], refs[1:]) if segments else (None, refs)
  *refs, b_column, c_column = refs
  x_ref, dt_ref, a_ref, b_ref, c_ref, first_ref, y_ref, state_ref, *states = (
    refs
  )
  _spread((b_ref, c_ref), (b_column, c_column))
  chunk, chunks = pl.program_id(1), pl.num_programs(1)
  starts = _starter(starts_ref, chunk, chunks)

  @pl.when(chunk == 0)
  def _():
    state_ref[...] = first_ref[...]

  for ref in states:
    ref[0, 0] = state_ref[0]
  channels = x_ref.shape[2]
  width = _width(channels, 'forward')

  def group(lanes):
    A = a_ref[:, lanes]

    def tile(i, h):
      tokens = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
      dt = dt_ref[0, tokens, lanes].astype(jnp.float32)
      u = dt * x_ref[0, tokens, lanes].astype(jnp.float32)
      read = []
      for j in range(TILE):
        if segments:
          h = jnp.where(starts(i * TILE + j), 0, h)
        b, c = (
          _across(ref[i * TILE + j], width) for ref in (b_column, c_column)
        )
        h = jnp.exp(_rows(dt, j) * A) * h + _rows(u, j) * b
        read.append(h * c)
      y_ref[0, tokens, lanes] = _sums_of_rows(read).astype(y_ref.dtype)
      return h

    state_ref[0, :, lanes] = jax.lax.fori_loop(
      0, CHUNK // TILE, tile, state_ref[0, :, lanes]
    )

  _over(channels, width, group)


@functools.partial(jax.jit, static_argnames='interpret')
def backward(x, dt, A, B, C, starts, states, d_y, d_last, *, interpret):
  """The cotangents of x, dt, A, B, C and the first state.

  Takes the arguments and the states of `forward`, and the cotangents of its
  outputs and last state. That of A is float32 [B, S, D], of each sequence.
  """
  sizes = _Sizes(x, A, backward=True)
  tokens, by_token = sizes.tokens(), sizes.by_token()
  width = _width(sizes.channels, 'backward')
  count = sizes.states_count
  columns = (sizes.batch, count, sizes.padded[1])
  d_x, d_dt, d_A, d_B, d_C, d_first = sizes.call(
    functools.partial(_backward, segments=starts is not None),
    [
      (sizes.pad(x), tokens),
      (sizes.pad(dt), tokens),
      (A, sizes.shared()),
      (sizes.columns(B), by_token),
      (sizes.columns(C), by_token),
      (states, sizes.states()),
      (sizes.pad(d_y), tokens),
      (d_last, sizes.state()),
    ],
    starts,
    [
      (sizes.padded, x.dtype, tokens),
      (sizes.padded, dt.dtype, tokens),
      (d_last.shape, jnp.float32, sizes.state()),
      (columns, jnp.float32, by_token),
      (columns, jnp.float32, by_token),
      (d_last.shape, jnp.float32, sizes.state()),
    ],
    [
      *[sizes.spread()] * 4,
      pltpu.VMEM((CHUNK, count, width), jnp.float32),
    ],
    'selective_scan_backward',
    20,
    interpret,
  )
  T = sizes.length
  return (
    d_x[:, :T],
    d_dt[:, :T],
    d_A,
    jnp.swapaxes(d_B, 1, 2)[:, :T].astype(B.dtype),
    jnp.swapaxes(d_C, 1, 2)[:, :T].astype(C.dtype),
    d_first,
  )


def _backward(*refs, segments):
  starts_ref, refs = (refs[0], refs[1:]) if segments else (None, refs)
  (
    x_ref, dt_ref, a_ref, b_ref, c_ref, states_ref, d_y_ref, last_ref,
    d_x_ref, d_dt_ref, d_a_ref, d_b_ref, d_c_ref, state_ref,
    b_column, c_column, d_b_column, d_c_column, kept_ref,
  ) = refs  # fmt: skip
  _spread((b_ref, c_ref), (b_column, c_column))
  step, chunks = pl.program_id(1), pl.num_programs(1)
  starts = _starter(starts_ref, chunks - 1 - step, chunks)

  @pl.when(step == 0)
  def _():
    state_ref[...] = last_ref[...]
    d_a_ref[...] = jnp.zeros_like(d_a_ref)

  d_b_column[...] = jnp.zeros_like(d_b_column)
  d_c_column[...] = jnp.zeros_like(d_c_column)
  channels = x_ref.shape[2]
  width = _width(channels, 'backward')

  def read(lanes, i):
    tokens = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
    dt = dt_ref[0, tokens, lanes].astype(jnp.float32)
    x = x_ref[0, tokens, lanes].astype(jnp.float32)
    return tokens, dt, x, dt * x

  def group(lanes):
    A = a_ref[:, lanes]

    def again(i, h):
      _, dt, _, u = read(lanes, i)
      for j in range(TILE):
        t = i * TILE + j
        if segments:
          h = jnp.where(starts(t), 0, h)
        kept_ref[t] = h
        b = _across(b_column[t], width)
        h = jnp.exp(_rows(dt, j) * A) * h + _rows(u, j) * b
      return h

    # The states before every token, after resets.
    jax.lax.fori_loop(0, CHUNK // TILE, again, states_ref[0, 0, :, lanes])

    def tile(k, carry):
      i = CHUNK // TILE - 1 - k
      d_h, d_a = carry
      tokens, dt, x, u = read(lanes, i)
      d_y = d_y_ref[0, tokens, lanes].astype(jnp.float32)
      of_u, of_dt = [None] * TILE, [None] * TILE
      for j in reversed(range(TILE)):
        t = i * TILE + j
        b, c = (_across(ref[t], width) for ref in (b_column, c_column))
        decay = jnp.exp(_rows(dt, j) * A)
        before = kept_ref[t]
        h = decay * before + _rows(u, j) * b
        d_h = d_h + c * _rows(d_y, j)
        d_c_column[t] += _lane_sums(h * _rows(d_y, j))
        d_b_column[t] += _lane_sums(d_h * _rows(u, j))
        of_u[j] = d_h * b
        d_h = d_h * decay
        exponent = d_h * before
        of_dt[j] = exponent * A
        d_a = d_a + exponent * _rows(dt, j)
        if segments:
          d_h = jnp.where(starts(t), 0, d_h)
      d_u = _sums_of_rows(of_u)
      d_x_ref[0, tokens, lanes] = (d_u * dt).astype(d_x_ref.dtype)
      d_dt_ref[0, tokens, lanes] = (d_u * x + _sums_of_rows(of_dt)).astype(
        d_dt_ref.dtype
      )
      return d_h, d_a

    d_h, d_a = jax.lax.fori_loop(
      0,
      CHUNK // TILE,
      tile,
      (state_ref[0, :, lanes], d_a_ref[0, :, lanes]),
    )
    state_ref[0, :, lanes], d_a_ref[0, :, lanes] = d_h, d_a

  _over(channels, width, group)
  d_b_ref[0], d_c_ref[0] = _gathered(d_b_column), _gathered(d_c_column)


def _lane_sums(x):
  """[S, width] to [S, 128], whose lanes are to be summed."""
  return sum(jnp.split(x, x.shape[1] // LANES, 1))
