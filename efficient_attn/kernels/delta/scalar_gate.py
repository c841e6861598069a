"""S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, S' = a_t S_{t-1}, a gate per head.

The chunkwise form of DeltaNet (Yang et al. 2406.06484) and Gated DeltaNet
(2412.06464) in one pass over chunks of 128 tokens, the state in VMEM. With b
the cumulative log decay of a chunk and D_ij = e^(b_i - b_j) for j <= i, the
updates n solve a triangular system (see `inverse`), and the rest is that of
linear attention on them:

  A = beta_i (D * K K^T), below the diagonal
  (I + A) N = beta (V - e^b (K S))
  O = c (D * Q K^T) N + c e^b (Q S)
  S <- e^(b_C) S + K^T (e^(b_C - b) N)

Its gradient, from the last chunk to the first with the saved states, all
scores transposed (key, query) and the updates made again:

  dN = c (D * Q K^T)^T dO + e^(b_C - b) (K dS)        (I + A)^T Y = dN
  W = c D * (dO N^T)        W' = -beta_i (D * (Y N^T)), below the diagonal
  dV = beta Y               U = e^b (Y S^T)
  dQ = W K + c e^b (dO S^T)
  dK = W^T Q + (W' + W'^T) K - beta U + e^(b_C - b) (N dS^T)
  dS <- e^(b_C) dS + c (e^b Q)^T dO - K^T (beta e^b Y)
  dbeta_i = y_i . v_i - k_i . u_i - sum_j D_ij (k_i . k_j) (y_i . n_j)

The gradient of b adds the same float32 numbers with both signs, as that of
linear attention does. Resets, of segments and of hard gates, are masks: see
`resets`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from efficient_attn.kernels.delta.inverse import inverses
from efficient_attn.kernels.layout import (
  CHUNK,
  NT,
  TN,
  Blocks,
  by_head,
  by_token,
  from_programs,
  iota,
  load_state,
  products,
  sizes_of,
)
from efficient_attn.kernels.passes import backward_pass, forward_pass
from efficient_attn.kernels.resets import Gate, gate_cotangent, prepare

# The most heads of a program by pass, see `layout.HEADS`.
HEADS = {'forward': 8, 'backward': 8}


@functools.partial(
  jax.jit, static_argnames=('scale', 'dtype', 'operand', 'save', 'interpret')
)
def forward(
  q, k, v, beta, log_decay, state, starts,
  *, scale, dtype, operand, save, interpret,
):  # fmt: skip
  """The outputs and the last state.

  Args:
    q: [B, T, K, H].
    k: [B, T, K, H].
    v: [B, T, K, G, V].
    beta: [B, T, K, G, 1].
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
  sizes = sizes_of(q, v, operand, HEADS['forward'])
  rows, columns, _ = prepare(log_decay, starts, sizes, _strength(beta, sizes))
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
    name='delta_rule_forward',
    interpret=interpret,
    cost=(
      CHUNK * (2 * sizes.channels + 3 * sizes.width + CHUNK)
      + 3 * sizes.channels * sizes.width,
      CHUNK,
    ),
  )


def _strength(beta, sizes):
  return by_head(beta, sizes, jnp.float32)[..., 0]


class _Head(Gate):
  """The gate of one head in one chunk, and beta.

  Attributes:
    beta: [C, 1].
    beta_row: [1, C].
  """

  def __init__(self, rows_ref, columns_ref, head, sizes):
    super().__init__(rows_ref, columns_ref, head, sizes)
    i = rows_ref.shape[3] - sizes.heads + head
    self.beta_row = rows_ref[0, 0, 0, i : i + 1]
    i = columns_ref.shape[3] - sizes.heads + head
    self.beta = columns_ref[0, 0, :, i : i + 1]


def _forward(q_ref, k_ref, v_ref, rows_ref, columns_ref, first_ref,
             out_ref, state_ref, *states_ref, sizes, scale):  # fmt: skip

  load_state(first_ref, state_ref)

  dot = products(sizes.operand)
  row, column = iota(0), iota(1)
  heads, overlaps, rights = [], [], []
  for group in range(sizes.read):
    k = k_ref[0, group]
    both = jnp.concatenate([q_ref[0, group], k])
    pairs = dot(both, k, NT)
    for n in range(group * sizes.shared, (group + 1) * sizes.shared):
      head = _Head(rows_ref, columns_ref, n, sizes)
      inside = (row >= column) & (row <= head.ends)
      decay = jnp.exp(jnp.minimum(head.spans(), 0))
      scores = jnp.where(inside, pairs[:CHUNK] * (scale * decay), 0)
      overlap = jnp.where(inside & (row > column), pairs[CHUNK:] * decay, 0)
      past = dot(both, state_ref[0, n])
      before, reads = head.before(sizes.width), head.reads(sizes.width)
      head.key, head.scores = k, scores.astype(sizes.operand)
      head.past = jnp.where(reads, past[:CHUNK] * (scale * before), 0)
      known = jnp.where(reads, past[CHUNK:] * before, 0)
      heads.append(head)
      overlaps.append(head.beta * overlap)
      rights.append(head.beta * (v_ref[0, n].astype(jnp.float32) - known))
  solved = inverses(overlaps, sizes.operand)
  updates = [dot(x, right) for x, right in zip(solved, rights, strict=True)]
  for n, (head, update) in enumerate(zip(heads, updates, strict=True)):
    state = state_ref[0, n]
    out = dot(head.scores, update) + head.past
    out_ref[0, n] = out.astype(out_ref.dtype)
    for ref in states_ref:
      ref[0, 0, n] = state.astype(ref.dtype)
    written = update * head.after(sizes.width)
    written = jnp.where(head.writes(sizes.width), written, 0)
    kept = jnp.where(head.keeps, state * head.total, 0)
    state_ref[0, n] = kept + dot(head.key, written, TN)


@functools.partial(jax.jit, static_argnames=('scale', 'operand', 'interpret'))
def backward(
  q, k, v, beta, log_decay, starts, states, d_out, d_last,
  *, scale, operand, interpret,
):  # fmt: skip
  """The cotangents of q, k, v, beta, log_decay and the first state.

  Takes the arguments and the states of `forward`, and the cotangents of its
  outputs and last state.
  """
  sizes = sizes_of(q, v, operand, HEADS['backward'])
  rows, columns, resets = prepare(
    log_decay, starts, sizes, _strength(beta, sizes)
  )
  blocks = Blocks(sizes, backward=True)
  count = 2 * sizes.heads
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
    name='delta_rule_backward',
    interpret=interpret,
    cost=(
      CHUNK * (6 * sizes.channels + 4 * sizes.width + CHUNK)
      + 5 * sizes.channels * sizes.width,
      CHUNK,
    ),
  )

  def by_row(i):  # of the gate or of beta, [B, N, T]
    part = slice(i * sizes.heads, (i + 1) * sizes.heads)
    of_columns = jnp.swapaxes(d_columns[..., part], 2, 3)
    return from_programs(d_rows[..., part, :], sizes) + of_columns.reshape(
      resets.shape
    )

  return (
    d_q,
    d_k,
    d_v,
    by_token(by_row(1)[..., None], beta),
    gate_cotangent(by_row(0), resets, log_decay, sizes),
    d_first,
  )


def _backward(q_ref, k_ref, v_ref, d_out_ref, states_ref,
              rows_ref, columns_ref, last_ref, d_q_ref, d_k_ref, d_v_ref,
              d_rows_ref, d_columns_ref, state_ref,
              *, sizes, scale):  # fmt: skip

  load_state(last_ref, state_ref)

  dot = products(sizes.operand)
  row, column = iota(0), iota(1)
  heads, overlaps, rights = [], [], []
  for group in range(sizes.read):
    k = k_ref[0, group]
    pairs = dot(k, jnp.concatenate([k, q_ref[0, group]]), NT)  # [key, both]
    for n in range(group * sizes.shared, (group + 1) * sizes.shared):
      head = _Head(rows_ref, columns_ref, n, sizes)
      future = (row <= column) & (row >= head.starts)
      head.decay = jnp.where(future, jnp.exp(-jnp.abs(head.spans())), 0)
      overlap = pairs[:, :CHUNK] * head.decay
      head.overlap = jnp.where(row < column, overlap, 0)
      head.scores = pairs[:, CHUNK:] * (scale * head.decay)
      d_write = dot(k, state_ref[0, n]) * head.after(sizes.width)
      head.d_write = jnp.where(head.writes(sizes.width), d_write, 0)
      known = dot(k, states_ref[0, 0, n]) * head.before(sizes.width)
      known = jnp.where(head.reads(sizes.width), known, 0)
      v = v_ref[0, n].astype(jnp.float32)
      head.right = (head.beta * (v - known)).astype(sizes.operand)
      heads.append(head)
      overlaps.append(head.overlap * head.beta_row)
      rights.append(dot(head.scores, d_out_ref[0, n]) + head.d_write)
  solved = inverses(overlaps, sizes.operand, upper=True)
  for n, head in enumerate(heads):
    d_out = d_out_ref[0, n]
    head.d_right = dot(solved[n], rights[n])
    head.update = dot(solved[n], head.right, TN)
    both = jnp.concatenate([head.d_right.astype(d_out.dtype), d_out])
    head.of_update = dot(head.update, both, NT)  # [key, both]

  lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 2 * sizes.heads), 1)
  d_columns = jnp.zeros(lane.shape, jnp.float32)
  for group in range(sizes.read):
    q, k = q_ref[0, group], k_ref[0, group]
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    d_q = d_k = 0
    for n in range(group * sizes.shared, (group + 1) * sizes.shared):
      head, d_right = heads[n], heads[n].d_right
      beta, d_out = head.beta, d_out_ref[0, n].astype(jnp.float32)
      state, d_state = states_ref[0, 0, n], state_ref[0, n]
      d_pairs = head.of_update[:, CHUNK:] * (scale * head.decay)
      d_overlap = head.of_update[:, :CHUNK] * -head.decay
      d_overlap = jnp.where(row < column, d_overlap, 0) * head.beta_row
      of_beta = head.of_update[:, :CHUNK] * -head.overlap

      before, reads = head.before(sizes.width), head.reads(sizes.width)
      d_read = jnp.where(reads, d_out * (scale * before), 0)
      d_known = jnp.where(reads, d_right * before, 0)
      of_state = dot(jnp.concatenate([d_read, d_known]), state, NT)
      to_q, to_k = of_state[:CHUNK], beta * of_state[CHUNK:]
      d_written = dot(head.update, d_state, NT) * head.after(sizes.channels)
      d_written = jnp.where(head.writes(sizes.channels), d_written, 0)
      d_q += to_q + dot(d_pairs, k, TN)
      d_k += d_written - to_k + dot(d_pairs, q)
      d_k += dot(d_overlap + d_overlap.T, k)
      d_v_ref[0, n] = (beta * d_right).astype(d_v_ref.dtype)

      # Of b: + for the query, - for the key of a pair, and both for the token
      # and the end of the chunk in what is written.
      weights = head.of_update[:, CHUNK:] * head.scores
      weights = jnp.where(row < column, weights, 0) + of_beta * head.beta_row
      writes = head.d_write * head.update
      d_kept = jnp.where(head.keeps, d_state * head.total, 0)
      end = _sums(d_kept * state.astype(jnp.float32), writes)
      d_rows_ref[0, 0, 0, n : n + 1] = jnp.sum(
        weights, 0, keepdims=True
      ) + jnp.where(column[:1] == CHUNK - 1, end, 0)
      of_token = _lane_sums(q32 * to_q - k32 * to_k, -writes, -weights)
      d_columns = jnp.where(lane == n, of_token, d_columns)

      d_rows_ref[0, 0, 0, pl.ds(sizes.heads + n, 1)] = jnp.sum(
        of_beta, 0, keepdims=True
      )
      v = v_ref[0, n].astype(jnp.float32)
      of_strength = _lane_sums(d_right * v, -k32 * of_state[CHUNK:])
      d_columns = jnp.where(lane == sizes.heads + n, of_strength, d_columns)

      state_ref[0, n] = d_kept + dot(
        jnp.concatenate([q, k]), jnp.concatenate([d_read, -beta * d_known]), TN
      )
    d_q_ref[0, group] = d_q.astype(d_q_ref.dtype)
    d_k_ref[0, group] = d_k.astype(d_k_ref.dtype)
  d_columns_ref[0, 0] = d_columns


def _sums(x, y):
  """The sum of two matrices, [1, 1]."""
  x, y = (jnp.sum(z, axis=0, keepdims=True) for z in (x, y))
  if x.shape != y.shape:
    x, y = (jnp.sum(z, axis=1, keepdims=True) for z in (x, y))
  return jnp.sum(x + y, axis=1, keepdims=True)


def _lane_sums(*terms):
  """The sum of terms over lanes, [C, 1]; one reduction for each width."""
  widths = {}
  for x in terms:
    widths[x.shape[1]] = widths.get(x.shape[1], 0) + x
  return sum(jnp.sum(x, 1, keepdims=True) for x in widths.values())
