"""h_t = e^(g_t) h_{t-1} + x_t for every channel, each with its gates.

The tokens of a tile are composed in three steps, (a1, x1) and then (a2, x2) to
(a1 a2, a2 x1 + x2). There are only products of decays in [0, 1], and one of
zero forgets exactly. The state is in registers and VMEM. The backward pass
computes the states of a chunk again from the one before it, and composes in the
other direction

  p_t = e^(g_t) (dh_t + p_{t+1})    dx_t = dh_t + p_{t+1}    dg_t = p_t h_{t-1}
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from efficient_attn.kernels.scan.channels import (
  TILE,
  Blocks,
  composed,
  kept,
  neighbours,
  over_tiles,
  rows,
)

# The channels that run side by side: more hide latency until they spill.
LANES = {'forward': 512, 'backward': 256}


@functools.partial(jax.jit, static_argnames=('dtype', 'save', 'interpret'))
def forward(x, log_decay, state, starts, *, dtype, save, interpret):
  """The states after every token.

  Args:
    x: [B, G, T, W], see `channels.by_group`.
    log_decay: [B | 1, G, T, W].
    state: before token 0, [B, G, 1, W], float32.
    starts: [B, T], whether a segment begins, or None.
    dtype: of the states of tokens.
    save: whether to return the states before every chunk.
    interpret: see `pl.pallas_call`.

  Returns:
    h [B, G, chunks * CHUNK, W], the last state and, if `save`, the states
    [chunks, B, G, 1, W].
  """
  blocks = Blocks(x, backward=False)
  outputs = [
    blocks.results(dtype),
    (state.shape, jnp.float32, blocks.state()),
    ((blocks.chunks, *state.shape), jnp.float32, blocks.states()),
  ]
  return blocks.call(
    functools.partial(_forward, segments=starts is not None),
    [
      *_marks(starts, blocks),
      blocks.tokens(x),
      blocks.tokens(log_decay),
      (state, blocks.state()),
    ],
    outputs if save else outputs[:2],
    0,
    lanes=LANES['forward'],
    name='diagonal_scan_forward',
    work=10,
    interpret=interpret,
  )


def _marks(starts, blocks):
  if starts is None:
    return []
  return [blocks.tokens(starts.astype(jnp.float32)[:, None, :, None])]


def _decay(gate_ref, starts_ref, part, i):
  decay = jnp.exp(gate_ref[part.tile(i)].astype(jnp.float32))
  if starts_ref is None:
    return decay
  return jnp.where(starts_ref[0, :, rows(i)] > 0, 0, decay)


def _states(x_ref, decay, part, i, before):
  """The states of the tokens of tile i."""
  x = x_ref[part.tile(i)].astype(jnp.float32)
  decay, (x,) = composed(decay, [x], reverse=False)
  return x + kept(decay, before)


def _split(refs, segments):
  return (refs[0], refs[1:]) if segments else (None, refs)


def _forward(parts, *refs, segments):
  starts_ref, refs = _split(refs, segments)
  x_ref, gate_ref, first_ref, h_ref, state_ref, *states_ref = refs

  @pl.when(pl.program_id(1) == 0)
  def _():
    state_ref[...] = first_ref[...]

  for ref in states_ref:
    ref[0] = state_ref[...]

  def of(part):
    def tile(i, before):
      decay = _decay(gate_ref, starts_ref, part, i)
      h = _states(x_ref, decay, part, i, before)
      h_ref[part.tile(i)] = h.astype(h_ref.dtype)
      return h[:, TILE - 1 :]

    state_ref[part.state] = over_tiles(tile, state_ref[part.state])

  parts.each(of)


@functools.partial(jax.jit, static_argnames='interpret')
def backward(x, log_decay, starts, states, d_h, d_last, *, interpret):
  """The cotangents of x, log_decay and the first state.

  Takes the arguments and the states of `forward`, and the cotangents of its
  states of tokens and last state. The former are [B, G, chunks * CHUNK, W],
  that of log_decay in float32 where it is to be summed over B.
  """
  blocks = Blocks(x, backward=True)
  own = log_decay.shape[0] == x.shape[0]
  return blocks.call(
    functools.partial(_backward, segments=starts is not None),
    [
      *_marks(starts, blocks),
      blocks.tokens(x),
      blocks.tokens(log_decay),
      (states, blocks.states()),
      blocks.tokens(d_h),
      (d_last, blocks.state()),
    ],
    [
      blocks.results(x.dtype),
      blocks.results(log_decay.dtype if own else jnp.float32),
      (d_last.shape, jnp.float32, blocks.state()),
    ],
    1,
    lanes=LANES['backward'],
    name='diagonal_scan_backward',
    work=24,
    interpret=interpret,
  )


def _backward(parts, *refs, segments):
  starts_ref, refs = _split(refs, segments)
  (
    x_ref, gate_ref, states_ref, d_h_ref, last_ref,
    d_x_ref, d_gate_ref, state_ref, before_ref,
  ) = refs  # fmt: skip

  @pl.when(pl.program_id(1) == 0)
  def _():
    state_ref[...] = last_ref[...]

  def of(part):
    def again(i, before):
      decay = _decay(gate_ref, starts_ref, part, i)
      h = _states(x_ref, decay, part, i, before)
      before_ref[:, rows(i)] = neighbours(h, 1, before, reverse=False)
      return h[:, TILE - 1 :]

    over_tiles(again, states_ref[part.states])

    def tile(i, after):
      decay = _decay(gate_ref, starts_ref, part, i)
      d_h = d_h_ref[part.tile(i)].astype(jnp.float32)
      total, (p,) = composed(decay, [kept(decay, d_h)], reverse=True)
      p = p + kept(total, after)
      d_x = d_h + neighbours(p, 1, after, reverse=True)
      d_gate = p * jnp.where(decay == 0, 0, before_ref[:, rows(i)])
      d_x_ref[part.tile(i)] = d_x.astype(d_x_ref.dtype)
      d_gate_ref[part.tile(i)] = d_gate.astype(d_gate_ref.dtype)
      return p[:, :1]

    state_ref[part.state] = over_tiles(
      tile, state_ref[part.state], reverse=True
    )

  parts.each(of)
