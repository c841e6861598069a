"""S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = c S_t^T q_t, gated per channel.

The chunkwise form of GLA (Yang et al. 2312.06635), HGRN-2 (2404.07904) and,
with an exclusive read, RWKV-6 (2404.05892) in one pass over the chunks of 128
tokens, the state in VMEM. With `before` and `after` the products of the gates
from the start of a chunk to a token and from it to the end,

  O  = c A V + c (Q * before) S         A_ij = sum_h q_ih k_jh a_h(j, i]
  S <- diag(before_C) S + (K * after)^T V

A and the gradients of q, k and the gate come from a tree of decays, see
`decay_tree`. States are kept transposed, [V, H]: their decay is then a row.
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
from efficient_attn.kernels.gated_head import GatedHead
from efficient_attn.kernels.layout import (
  CHUNK,
  HEADS,
  NT,
  TN,
  Blocks,
  load_state,
  products,
  sizes_of,
)
from efficient_attn.kernels.passes import backward_pass, forward_pass


@functools.partial(
  jax.jit,
  static_argnames=(
    'inclusive', 'scale', 'dtype', 'operand', 'save', 'interpret',
  ),
)  # fmt: skip
def forward(
  q, k, v, log_decay, state, starts,
  *, inclusive, scale, dtype, operand, save, interpret,
):  # fmt: skip
  """The outputs and the last state.

  Args:
    q: [B, T, K, H].
    k: [B, T, K, H].
    v: [B, T, K, G, V].
    log_decay: [B | 1, T, K, G, H].
    state: before token 0, [B, K, G, H, V], float32.
    starts: [B, T], whether a segment begins, or None.
    inclusive: whether a token reads itself, after its gate.
    scale: c.
    dtype: of the outputs.
    operand: of the operands of matrix products, bfloat16 or float32.
    save: whether to return the states before every chunk.
    interpret: see `pl.pallas_call`.

  Returns:
    out [B, T, K, G, V], the last state [B, K, G, H, V] and, if `save`, the
    states [chunks, B, K, G, V, H].
  """
  sizes = sizes_of(q, v, operand, HEADS['channel', 'forward'])
  blocks = Blocks(sizes, backward=False)
  return forward_pass(
    _body(_forward, sizes, scale, inclusive, starts),
    blocks,
    q if inclusive else past_starts(q, starts),
    k,
    v,
    [
      (
        closed_gate(log_decay, starts, sizes),
        blocks.tokens(sizes.heads, sizes.channels),
      ),
    ],
    state,
    marked_reads(starts, blocks),
    dtype=dtype,
    save=save,
    transposed=True,
    name='channel_gate_forward',
    interpret=interpret,
    cost=(
      CHUNK * (5 * sizes.channels + sizes.width)
      + 2 * sizes.channels * sizes.width,
      sizes.channels,
    ),
  )


def _forward(q_ref, k_ref, v_ref, gate_ref, first_ref, *refs,
             sizes, scale, inclusive, segments):  # fmt: skip
  reads_ref, (out_ref, state_ref, *states_ref) = split_refs(refs, segments)

  load_state(first_ref, state_ref)

  dot = products(sizes.operand)
  for group in range(sizes.read):
    q, k = scaled_queries(q_ref, group, scale), float_keys(k_ref, group)
    for head in range(group * sizes.shared, (group + 1) * sizes.shared):
      v, state = v_ref[0, head], state_ref[0, head]
      for ref in states_ref:
        ref[0, 0, head] = state.astype(ref.dtype)
      own = GatedHead(
        [q], [k], gate_ref[0, head], gated=[inclusive], inclusive=inclusive
      )
      ((scores,),) = own.scores(dot)
      past = reading(dot(own.reads(), state, NT), reads_ref)
      out_ref[0, head] = (dot(scores, v) + past).astype(out_ref.dtype)
      decayed = kept(state, own.total, segments)
      state_ref[0, head] = decayed + dot(v, own.writes(), TN)


@functools.partial(
  jax.jit, static_argnames=('inclusive', 'scale', 'operand', 'interpret')
)
def backward(
  q, k, v, log_decay, starts, states, d_out, d_last,
  *, inclusive, scale, operand, interpret,
):  # fmt: skip
  """The cotangents of q, k, v, log_decay and the first state.

  Takes the arguments and the states of `forward`, and the cotangents of its
  outputs and last state.
  """
  sizes = sizes_of(q, v, operand, HEADS['channel', 'backward'])
  blocks = Blocks(sizes, backward=True)
  gate = closed_gate(log_decay, starts, sizes)
  gates = [(gate, blocks.tokens(sizes.heads, sizes.channels))]
  d_q, d_k, d_v, d_gate, d_first = backward_pass(
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
    [(x.shape, jnp.float32, spec) for x, spec in gates],
    transposed=True,
    name='channel_gate_backward',
    interpret=interpret,
    cost=(
      CHUNK * (15 * sizes.channels + 3 * sizes.width)
      + 4 * sizes.channels * sizes.width,
      sizes.channels,
    ),
  )
  return (
    d_q if inclusive else past_starts(d_q, starts),
    d_k,
    d_v,
    gate_cotangent(d_gate, log_decay, starts, sizes),
    d_first,
  )


def _backward(q_ref, k_ref, v_ref, d_out_ref, states_ref, gate_ref, last_ref,
              *refs, sizes, scale, inclusive, segments):  # fmt: skip
  reads_ref, outputs = split_refs(refs, segments)
  d_q_ref, d_k_ref, d_v_ref, d_gate_ref, state_ref = outputs

  load_state(last_ref, state_ref)

  dot = products(sizes.operand)
  for group in range(sizes.read):
    q, k = scaled_queries(q_ref, group, scale), float_keys(k_ref, group)
    d_q_sum = d_k_sum = 0
    for head in range(group * sizes.shared, (group + 1) * sizes.shared):
      v, d_out = v_ref[0, head], d_out_ref[0, head]
      state, d_state = states_ref[0, 0, head], state_ref[0, head]
      own = GatedHead(
        [q], [k], gate_ref[0, head], gated=[inclusive], inclusive=inclusive
      )
      d_kept = kept(d_state, own.total, segments)
      state_ref[0, head] = d_kept + dot(d_out, own.reads(), TN)
      (d_q,), (d_k,), d_gate_ref[0, head], ((scores,),) = own.pull(
        dot(d_out, v, NT),
        dot(v, d_out, NT),
        reading(dot(d_out, state), reads_ref),
        dot(v, d_state),
        jnp.sum(d_kept * state.astype(jnp.float32), 0, keepdims=True),
        [row_products(v, d_out)],
        dot,
      )
      d_v = dot(scores, d_out) + dot(own.writes(), d_state, NT)
      d_v_ref[0, head] = d_v.astype(d_v_ref.dtype)
      d_q_sum += flat(d_q) * scale
      d_k_sum += flat(d_k)
    d_q_ref[0, group] = d_q_sum.astype(d_q_ref.dtype)
    d_k_ref[0, group] = d_k_sum.astype(d_k_ref.dtype)


def _body(kernel, sizes, scale, inclusive, starts):
  return functools.partial(
    kernel,
    sizes=sizes,
    scale=scale,
    inclusive=inclusive,
    segments=starts is not None,
  )
