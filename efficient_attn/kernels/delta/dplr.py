"""S_t = diag(g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, gates per channel.

Diagonal plus low rank transitions, those of RWKV-7 (Peng et al. 2503.14456), in
one pass over chunks of 128 tokens, the state in VMEM. What is recalled,
y_t = a_t^T S_{t-1}, is written to b_t as v_t is to k_t: a tree of decays (see
`decay_tree`) of two sets of queries and two of keys. Both read before the gate
of their token; that of a q which reads its own token is among its factors. With
`before` and `after` the decays from the start of the chunk and to its end, and
scores of the past alone where a reads,

  (I - A_ab) Y = (A * before) S + A_ak V        (see `inverse`)
  O = A_qk V + A_qb Y + (Q * before) S
  S <- diag(before_C) S + (K * after)^T V + (B * after)^T Y

Its gradient, from the last chunk to the first with the saved states, what is
recalled made again:

  (I - A_ab)^T R = A_qb^T dO + (B * after) dS
  dV = A_qk^T dO + A_ak^T R + (K * after) dS
  [dA_qk dA_qb; dA_ak dA_ab] = [dO; R] [V; Y]^T
  dS <- diag(before_C) dS + (Q * before)^T dO + (A * before)^T R

and those of q, a, k, b and the gate by the tree. States are kept transposed,
[V, H]: their decay is then a row.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn.kernels.channels import (
  closed_gate,
  float_keys,
  gate_cotangent,
  kept,
  marked_reads,
  past_starts,
  reading,
  row_products,
  scaled_queries,
  split_refs,
)
from efficient_attn.kernels.decay_tree import flat
from efficient_attn.kernels.delta.inverse import inverses
from efficient_attn.kernels.gated_head import GatedHead
from efficient_attn.kernels.layout import (
  CHUNK,
  NT,
  TN,
  Blocks,
  by_head,
  by_token,
  load_state,
  products,
  sizes_of,
  sum_parts,
)
from efficient_attn.kernels.passes import backward_pass, forward_pass

# The most heads of a program by pass, see `layout.HEADS`.
HEADS = {'forward': 8, 'backward': 4}


@functools.partial(
  jax.jit,
  static_argnames=(
    'inclusive', 'scale', 'dtype', 'operand', 'save', 'interpret',
  ),
)  # fmt: skip
def forward(
  q, k, a, b, v, log_decay, state, starts,
  *, inclusive, scale, dtype, operand, save, interpret,
):  # fmt: skip
  """The outputs and the last state.

  Args:
    q: [B, T, K, H].
    k: [B, T, K, H].
    a: [B, T, K, H].
    b: [B, T, K, H].
    v: [B, T, K, G, V].
    log_decay: [B | 1, T, K, G, H].
    state: before token 0, [B, K, G, H, V], float32.
    starts: [B, T], whether a segment begins, or None.
    inclusive: whether a token reads itself, after its gate.
    scale: factor on the outputs.
    dtype: of the outputs.
    operand: of the operands of matrix products, bfloat16 or float32.
    save: whether to return the states before every chunk.
    interpret: see `pl.pallas_call`.

  Returns:
    out [B, T, K, G, V], the last state [B, K, G, H, V] and, if `save`, the
    states [chunks, B, K, G, V, H].
  """
  sizes = sizes_of(q, v, operand, HEADS['forward'])
  blocks = Blocks(sizes, backward=False)
  return forward_pass(
    _body(_forward, sizes, scale, inclusive, starts),
    blocks,
    q if inclusive else past_starts(q, starts),
    k,
    v,
    _gates(past_starts(a, starts), b, log_decay, starts, blocks),
    state,
    marked_reads(starts, blocks),
    dtype=dtype,
    save=save,
    transposed=True,
    name='dplr_forward',
    interpret=interpret,
    cost=(
      CHUNK * (16 * sizes.channels + 4 * sizes.width + CHUNK)
      + 4 * sizes.channels * sizes.width,
      sizes.channels,
    ),
  )


def _body(kernel, sizes, scale, inclusive, starts):
  return functools.partial(
    kernel,
    sizes=sizes,
    scale=scale,
    inclusive=inclusive,
    segments=starts is not None,
  )


def _gates(a, b, log_decay, starts, blocks):
  sizes = blocks.sizes
  return [
    *((by_head(x, sizes, sizes.operand), blocks.keys()) for x in (a, b)),
    (
      closed_gate(log_decay, starts, sizes),
      blocks.tokens(sizes.heads, sizes.channels),
    ),
  ]


def _heads(refs, group, sizes, scale, inclusive):
  """The heads of a group: pairs (index, GatedHead)."""
  q_ref, k_ref, a_ref, b_ref, gate_ref = refs
  q = scaled_queries(q_ref, group, scale)
  a, k, b = (float_keys(x, group) for x in (a_ref, k_ref, b_ref))
  for head in range(group * sizes.shared, (group + 1) * sizes.shared):
    yield (
      head,
      GatedHead(
        [q, a],
        [k, b],
        gate_ref[0, head],
        gated=[inclusive, False],
        inclusive=inclusive,
      ),
    )


def _forward(q_ref, k_ref, v_ref, a_ref, b_ref, gate_ref, first_ref, *refs,
             sizes, scale, inclusive, segments):  # fmt: skip
  reads_ref, (out_ref, state_ref, *states_ref) = split_refs(refs, segments)

  load_state(first_ref, state_ref)

  dot = products(sizes.operand)
  refs = q_ref, k_ref, a_ref, b_ref, gate_ref
  overlaps, recalls, read, reading_b, written, totals = ([] for _ in range(6))
  for group in range(sizes.read):
    for head, own in _heads(refs, group, sizes, scale, inclusive):
      (of_k, of_b), (recall_k, recall_b) = own.scores(dot)
      past = reading(dot(own.reads(), state_ref[0, head], NT), reads_ref)
      past += dot(jnp.concatenate([of_k, recall_k]), v_ref[0, head])
      read.append(past[:CHUNK])
      recalls.append(past[CHUNK:].astype(sizes.operand))
      reading_b.append(of_b.astype(sizes.operand))
      overlaps.append(-recall_b)
      written.append(own.writes().astype(sizes.operand))
      totals.append(own.total)
  solved = inverses(overlaps, sizes.operand)
  recalls = [dot(x, right) for x, right in zip(solved, recalls, strict=True)]
  for head, recalled in enumerate(recalls):
    state = state_ref[0, head]
    out = read[head] + dot(reading_b[head], recalled)
    out_ref[0, head] = out.astype(out_ref.dtype)
    for ref in states_ref:
      ref[0, 0, head] = state.astype(ref.dtype)
    values = jnp.concatenate([v_ref[0, head], recalled.astype(sizes.operand)])
    decayed = kept(state, totals[head], segments)
    state_ref[0, head] = decayed + dot(values, written[head], TN)


@functools.partial(
  jax.jit, static_argnames=('inclusive', 'scale', 'operand', 'interpret')
)
def backward(
  q, k, a, b, v, log_decay, starts, states, d_out, d_last,
  *, inclusive, scale, operand, interpret,
):  # fmt: skip
  """The cotangents of q, k, a, b, v, log_decay and the first state.

  Takes the arguments and the states of `forward`, and the cotangents of its
  outputs and last state.
  """
  sizes = sizes_of(q, v, operand, HEADS['backward'])
  blocks = Blocks(sizes, backward=True)
  gates = _gates(past_starts(a, starts), b, log_decay, starts, blocks)
  d_q, d_k, d_v, d_a, d_b, d_gate, d_first = backward_pass(
    _body(_backward, sizes, scale, inclusive, starts),
    blocks,
    q if inclusive else past_starts(q, starts),
    k,
    v,
    gates,
    states,
    marked_reads(starts, blocks),
    d_out,
    d_last,
    [*blocks.key_parts(a, b), (gates[2][0].shape, jnp.float32, gates[2][1])],
    transposed=True,
    name='dplr_backward',
    interpret=interpret,
    cost=(
      CHUNK * (50 * sizes.channels + 10 * sizes.width + CHUNK)
      + 8 * sizes.channels * sizes.width,
      sizes.channels,
    ),
  )
  d_a, d_b = (by_token(sum_parts(d, sizes), x) for d, x in ((d_a, a), (d_b, b)))
  return (
    d_q if inclusive else past_starts(d_q, starts),
    d_k,
    past_starts(d_a, starts),
    d_b,
    d_v,
    gate_cotangent(d_gate, log_decay, starts, sizes),
    d_first,
  )


def _backward(q_ref, k_ref, v_ref, d_out_ref, states_ref,
              a_ref, b_ref, gate_ref, last_ref, *refs,
              sizes, scale, inclusive, segments):  # fmt: skip
  reads_ref, outputs = split_refs(refs, segments)
  d_q_ref, d_k_ref, d_v_ref, d_a_ref, d_b_ref, d_gate_ref, state_ref = outputs

  load_state(last_ref, state_ref)

  dot = products(sizes.operand)
  refs = q_ref, k_ref, a_ref, b_ref, gate_ref
  overlaps, recall_keys, rights, d_rights, d_values = [], [], [], [], []
  for group in range(sizes.read):
    for head, own in _heads(refs, group, sizes, scale, inclusive):
      (of_k, of_b), (recall_k, recall_b) = own.turned_scores(dot)
      recall_k = recall_k.astype(sizes.operand)
      past = dot(own.reads(1), states_ref[0, 0, head], NT)
      right = dot(recall_k, v_ref[0, head], TN) + reading(past, reads_ref)
      rights.append(right.astype(sizes.operand))
      recall_keys.append(recall_k)
      overlaps.append(-recall_b)
      d_written = dot(own.writes(), state_ref[0, head], NT)
      d_written += dot(jnp.concatenate([of_k, of_b]), d_out_ref[0, head])
      d_values.append(d_written[:CHUNK])
      d_rights.append(d_written[CHUNK:])
  solved = inverses(overlaps, sizes.operand, upper=True)
  d_rights = [dot(x, right) for x, right in zip(solved, d_rights, strict=True)]
  recalls = [dot(x, right, TN) for x, right in zip(solved, rights, strict=True)]

  for group in range(sizes.read):
    d_q_sum = d_k_sum = d_a_sum = d_b_sum = 0
    # The trees again: those of all heads would not fit.
    for head, own in _heads(refs, group, sizes, scale, inclusive):
      state, d_state = states_ref[0, 0, head], state_ref[0, head]
      d_out, v = d_out_ref[0, head], v_ref[0, head]
      d_right = d_rights[head].astype(sizes.operand)
      recalled = recalls[head].astype(sizes.operand)
      d_v = d_values[head] + dot(recall_keys[head], d_right)
      d_v_ref[0, head] = d_v.astype(d_v_ref.dtype)
      reads = jnp.concatenate([d_out, d_right])
      values = jnp.concatenate([v, recalled])
      d_kept = kept(d_state, own.total, segments)
      state_ref[0, head] = d_kept + dot(reads, own.reads(), TN)
      (d_q, d_a), (d_k, d_b), d_gate_ref[0, head], _ = own.pull(
        dot(reads, values, NT),
        dot(values, reads, NT),
        reading(dot(reads, state), reads_ref),
        dot(values, d_state),
        jnp.sum(d_kept * state.astype(jnp.float32), 0, keepdims=True),
        [row_products(x, d_out) for x in (v, recalled)],
        dot,
      )
      d_q_sum += flat(d_q) * scale
      d_k_sum += flat(d_k)
      d_a_sum += flat(d_a)
      d_b_sum += flat(d_b)
    for ref, x in (
      (d_q_ref, d_q_sum),
      (d_k_ref, d_k_sum),
      (d_a_ref, d_a_sum),
      (d_b_ref, d_b_sum),
    ):
      ref[0, group] = x.astype(ref.dtype)
