"""S_t = a_t S_{t-1} + k_t v_t^T, o_t = c S_t^T q_t, with a gate per head.

The chunkwise form of Mamba-2 (Dao and Gu 2405.21060), RetNet (2307.08621) and
Lightning attention (2405.17381) in one pass over the chunks of 128 tokens, the
state in VMEM. With b the cumulative log decay of a chunk,

  O  = c ((Q K^T) * D) V + c e^b (Q S)        D_ij = e^(b_i - b_j) for j <= i
  S <- e^(b_C) S + K^T (e^(b_C - b) V)

Its gradient, from the last chunk to the first with the saved states:

  dV = c ((K Q^T) * D^T) dO + e^(b_C - b) (K dS)
  dK = c ((V dO^T) * D^T) Q + e^(b_C - b) (V dS^T)
  dQ = c ((dO V^T) * D) K + c e^b (dO S^T)
  dS <- e^(b_C) dS + c (e^b Q)^T dO

K Q^T and V dO^T are computed again instead of transposed, which costs less.
The gradient of b adds the same float32 products with both signs, so that its
reverse cumulative sum cancels to float32 rounding also with bfloat16 operands.

Resets, of segments and of hard gates, are masks: see `resets`.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn.kernels.layout import (
  CHUNK,
  HEADS,
  NT,
  TN,
  Blocks,
  from_programs,
  iota,
  load_state,
  products,
  sizes_of,
)
from efficient_attn.kernels.passes import backward_pass, forward_pass
from efficient_attn.kernels.resets import Gate, gate_cotangent, prepare


@functools.partial(
  jax.jit, static_argnames=('scale', 'dtype', 'operand', 'save', 'interpret')
)
def forward(
  q, k, v, log_decay, state, starts, *, scale, dtype, operand, save, interpret
):
  """The outputs and the last state.

  Args:
    q: [B, T, K, H].
    k: [B, T, K, H].
    v: [B, T, K, G, V].
    log_decay: [B | 1, T, K, G, 1] or None.
    state: before token 0, [B, K, G, H, V], float32.
    starts: [B, T], whether a segment begins, or None.
    scale: c.
    dtype: of the outputs.
    operand: of the operands of matrix products, bfloat16 or float32.
    save: whether to return the states before every chunk.
    interpret: see `pl.pallas_call`.

  Returns:
    out [B, T, K, G, V], the last state [B, K, G, H, V] and, if `save`, the
    states [chunks, B, K, G, H, V].
  """
  sizes = sizes_of(q, v, operand, HEADS['scalar', 'forward'])
  matrix = (sizes.channels, sizes.width)
  rows, columns, _ = prepare(log_decay, starts, sizes)
  blocks = Blocks(sizes, backward=False)
  return forward_pass(
    functools.partial(_forward, sizes=sizes, scale=scale),
    blocks,
    q,
    k,
    v,
    [
      (rows, blocks.rows(rows.shape[-2])),
      (columns, blocks.columns(columns.shape[-1])),
    ],
    state,
    [],
    dtype=dtype,
    save=save,
    name='scalar_gate_forward',
    interpret=interpret,
    cost=(CHUNK * sum(matrix) + 2 * sizes.channels * sizes.width, CHUNK),
  )


def _forward(q_ref, k_ref, v_ref, rows_ref, columns_ref, first_ref,
             out_ref, state_ref, *states_ref, sizes, scale):  # fmt: skip

  load_state(first_ref, state_ref)

  dot = products(sizes.operand)
  row, column = iota(0), iota(1)
  for group in range(sizes.read):
    q, k = q_ref[0, group], k_ref[0, group]
    pairs = dot(q, k, NT)
    for head in range(group * sizes.shared, (group + 1) * sizes.shared):
      v, state = v_ref[0, head], state_ref[0, head]
      for ref in states_ref:
        ref[0, 0, head] = state.astype(ref.dtype)
      gate = Gate(rows_ref, columns_ref, head, sizes)
      inside = (row >= column) & (row <= gate.ends)
      decay = scale * jnp.exp(jnp.minimum(gate.spans(), 0))
      scores = jnp.where(inside, pairs * decay, 0)
      past = scale * gate.before(sizes.width) * dot(q, state)
      past = jnp.where(gate.reads(sizes.width), past, 0)
      out_ref[0, head] = (dot(scores, v) + past).astype(out_ref.dtype)
      written = v.astype(jnp.float32) * gate.after(sizes.width)
      written = jnp.where(gate.writes(sizes.width), written, 0)
      kept = jnp.where(gate.keeps, state * gate.total, 0)
      state_ref[0, head] = kept + dot(k, written, TN)


@functools.partial(jax.jit, static_argnames=('scale', 'operand', 'interpret'))
def backward(
  q, k, v, log_decay, starts, states, d_out, d_last,
  *, scale, operand, interpret,
):  # fmt: skip
  """The cotangents of q, k, v, log_decay and the first state.

  Takes the arguments and the states of `forward`, and the cotangents of its
  outputs and last state.
  """
  sizes = sizes_of(q, v, operand, HEADS['scalar', 'backward'])
  matrix = (sizes.channels, sizes.width)
  rows, columns, resets = prepare(log_decay, starts, sizes)
  blocks = Blocks(sizes, backward=True)
  count = sizes.heads
  d_q, d_k, d_v, d_rows, d_columns, d_first = backward_pass(
    functools.partial(_backward, sizes=sizes, scale=scale),
    blocks,
    q,
    k,
    v,
    [
      (rows, blocks.rows(rows.shape[-2])),
      (columns, blocks.columns(columns.shape[-1])),
    ],
    states,
    [],
    d_out,
    d_last,
    [
      ((*rows.shape[:3], count, CHUNK), jnp.float32, blocks.rows(count)),
      ((*columns.shape[:-1], count), jnp.float32, blocks.columns(count)),
    ],
    name='scalar_gate_backward',
    interpret=interpret,
    cost=(3 * CHUNK * sum(matrix) + 4 * sizes.channels * sizes.width, CHUNK),
  )

  d_columns = jnp.swapaxes(d_columns, 2, 3).reshape(resets.shape)
  d_sum = from_programs(d_rows, sizes) + d_columns
  return (
    d_q,
    d_k,
    d_v,
    gate_cotangent(d_sum, resets, log_decay, sizes),
    d_first,
  )


def _backward(q_ref, k_ref, v_ref, d_out_ref, states_ref, rows_ref,
              columns_ref, last_ref, d_q_ref, d_k_ref, d_v_ref, d_rows_ref,
              d_columns_ref, state_ref,
              *, sizes, scale):  # fmt: skip

  load_state(last_ref, state_ref)

  dot = products(sizes.operand)
  row, column = iota(0), iota(1)
  head_lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, sizes.heads), 1)
  d_columns = jnp.zeros((CHUNK, sizes.heads), jnp.float32)
  for group in range(sizes.read):
    q, k = q_ref[0, group], k_ref[0, group]
    pairs = dot(k, q, NT)  # [key, query]
    d_q = d_k = 0
    for head in range(group * sizes.shared, (group + 1) * sizes.shared):
      v, d_out = v_ref[0, head], d_out_ref[0, head]
      state, d_state = states_ref[0, 0, head], state_ref[0, head]
      gate = Gate(rows_ref, columns_ref, head, sizes)
      decay = scale * jnp.exp(-jnp.abs(gate.spans()))
      past = (row >= column) & (row <= gate.ends)
      future = (row <= column) & (row >= gate.starts)
      to_past = jnp.where(past, decay, 0)  # [query, key]
      to_future = jnp.where(future, decay, 0)  # [key, query]
      scores = pairs * to_future
      d_pairs = dot(v, d_out, NT)

      d_v = dot(k, d_state) * gate.after(sizes.width)
      d_v = jnp.where(gate.writes(sizes.width), d_v, 0)
      d_v_ref[0, head] = (d_v + dot(scores, d_out)).astype(d_v_ref.dtype)
      d_write = dot(v, d_state, NT) * gate.after(sizes.channels)
      d_write = jnp.where(gate.writes(sizes.channels), d_write, 0)
      d_k += dot(d_pairs * to_future, q) + d_write
      d_read = dot(d_out, state, NT) * (scale * gate.before(sizes.channels))
      d_read = jnp.where(gate.reads(sizes.channels), d_read, 0)
      d_q += dot(dot(d_out, v, NT) * to_past, k) + d_read

      # Of b: + for the query, - for the key of a pair, and both for the token
      # and the end of the chunk in what is written.
      weights = jnp.where(row < column, scores * d_pairs, 0)
      writes = k.astype(jnp.float32) * d_write
      reads = q.astype(jnp.float32) * d_read
      d_kept = jnp.where(gate.keeps, d_state * gate.total, 0)
      end = _sum(d_kept * state.astype(jnp.float32)) + _sum(writes)
      d_rows_ref[0, 0, 0, head : head + 1] = jnp.sum(
        weights, 0, keepdims=True
      ) + jnp.where(column[:1] == CHUNK - 1, end, 0)
      of_token = _lane_sum(reads - writes, weights)
      d_columns = jnp.where(head_lane == head, of_token, d_columns)

      read = q.astype(jnp.float32) * (scale * gate.before(sizes.channels))
      read = jnp.where(gate.reads(sizes.channels), read, 0)
      state_ref[0, head] = d_kept + dot(read, d_out, TN)
    d_q_ref[0, group] = d_q.astype(d_q_ref.dtype)
    d_k_ref[0, group] = d_k.astype(d_k_ref.dtype)
  d_columns_ref[0, 0] = d_columns


def _sum(x):
  x = jnp.sum(x, axis=0, keepdims=True)
  return jnp.sum(x, axis=1, keepdims=True)


def _lane_sum(plus, minus):
  """Sums of rows, [C, 1]; of equal widths in one reduction."""
  if plus.shape == minus.shape:
    return jnp.sum(plus - minus, 1, keepdims=True)
  return jnp.sum(plus, 1, keepdims=True) - jnp.sum(minus, 1, keepdims=True)
