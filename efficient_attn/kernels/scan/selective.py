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

from efficient_attn.kernels.scan.layout import (
  CHUNK,
  TILE,
  Sizes,
  across,
  gathered_columns,
  lane_sums,
  over_channels,
  row_of,
  spread_columns,
  starter,
  sums_of_rows,
  width_of,
)


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
  sizes = Sizes(x, A)
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


def _forward(*refs, segments):
  starts_ref, refs = (refs[0], refs[1:]) if segments else (None, refs)
  *refs, b_column, c_column = refs
  x_ref, dt_ref, a_ref, b_ref, c_ref, first_ref, y_ref, state_ref, *states = (
    refs
  )
  spread_columns((b_ref, c_ref), (b_column, c_column))
  chunk, chunks = pl.program_id(1), pl.num_programs(1)
  starts = starter(starts_ref, chunk, chunks)

  @pl.when(chunk == 0)
  def _():
    state_ref[...] = first_ref[...]

  for ref in states:
    ref[0, 0] = state_ref[0]
  channels = x_ref.shape[2]
  width = width_of(channels, 'forward')

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
          across(ref[i * TILE + j], width) for ref in (b_column, c_column)
        )
        h = jnp.exp(row_of(dt, j) * A) * h + row_of(u, j) * b
        read.append(h * c)
      y_ref[0, tokens, lanes] = sums_of_rows(read).astype(y_ref.dtype)
      return h

    state_ref[0, :, lanes] = jax.lax.fori_loop(
      0, CHUNK // TILE, tile, state_ref[0, :, lanes]
    )

  over_channels(channels, width, group)


@functools.partial(jax.jit, static_argnames='interpret')
def backward(x, dt, A, B, C, starts, states, d_y, d_last, *, interpret):
  """The cotangents of x, dt, A, B, C and the first state.

  Takes the arguments and the states of `forward`, and the cotangents of its
  outputs and last state. That of A is float32 [B, S, D], of each sequence.
  """
  sizes = Sizes(x, A, backward=True)
  tokens, by_token = sizes.tokens(), sizes.by_token()
  width = width_of(sizes.channels, 'backward')
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
  spread_columns((b_ref, c_ref), (b_column, c_column))
  step, chunks = pl.program_id(1), pl.num_programs(1)
  starts = starter(starts_ref, chunks - 1 - step, chunks)

  @pl.when(step == 0)
  def _():
    state_ref[...] = last_ref[...]
    d_a_ref[...] = jnp.zeros_like(d_a_ref)

  d_b_column[...] = jnp.zeros_like(d_b_column)
  d_c_column[...] = jnp.zeros_like(d_c_column)
  channels = x_ref.shape[2]
  width = width_of(channels, 'backward')

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
        b = across(b_column[t], width)
        h = jnp.exp(row_of(dt, j) * A) * h + row_of(u, j) * b
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
        b, c = (across(ref[t], width) for ref in (b_column, c_column))
        decay = jnp.exp(row_of(dt, j) * A)
        before = kept_ref[t]
        h = decay * before + row_of(u, j) * b
        d_h = d_h + c * row_of(d_y, j)
        d_c_column[t] += lane_sums(h * row_of(d_y, j))
        d_b_column[t] += lane_sums(d_h * row_of(u, j))
        of_u[j] = d_h * b
        d_h = d_h * decay
        exponent = d_h * before
        of_dt[j] = exponent * A
        d_a = d_a + exponent * row_of(dt, j)
        if segments:
          d_h = jnp.where(starts(t), 0, d_h)
      d_u = sums_of_rows(of_u)
      d_x_ref[0, tokens, lanes] = (d_u * dt).astype(d_x_ref.dtype)
      d_dt_ref[0, tokens, lanes] = (d_u * x + sums_of_rows(of_dt)).astype(
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

  over_channels(channels, width, group)
  d_b_ref[0], d_c_ref[0] = (
    gathered_columns(d_b_column),
    gathered_columns(d_c_column),
  )
