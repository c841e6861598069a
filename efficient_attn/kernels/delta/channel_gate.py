"""S_t = S' + beta_t k_t (v_t - S'^T (r_t k_t))^T with S' = diag(a_t) S_{t-1}.

The chunkwise form of Kimi Delta Attention (2510.26692), where r = 1, and of
GDN-2 (2605.22791) in one pass over chunks of 128 tokens, the state in VMEM. The
keys that erase, E = beta r K, are a second set of queries in the tree of decays
(see `decay_tree`). With a_(j, i] the decay
of a span, and `before` and `after` those from the start of the chunk and to its
end, the updates n solve a triangular system (see `inverse`):

  P_ij = c sum_h q_ih k_jh a_h(j, i]   A_ij = sum_h e_ih k_jh a_h(j, i], j < i
  (I + A) N = beta V - (E * before) S
  O = P N + c (Q * before) S
  S <- diag(before_C) S + (K * after)^T N

Its gradient, from the last chunk to the first with the saved states, the
updates made again:

  dN = P^T dO + (K * after) dS    (I + A)^T Y = dN    dV = beta Y
  dP = dO N^T    dA = -Y N^T
  dS <- diag(before_C) dS + c (Q * before)^T dO - (E * before)^T Y

and those of q, e, k and the gate from dP and dA by the tree. States are kept
transposed, [V, H]: their decay is then a row.
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
from efficient_attn.kernels.decay_tree import flat, tiles
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
)
from efficient_attn.kernels.passes import backward_pass, forward_pass

# The most heads of a program by pass, see `layout.HEADS`.
HEADS = {'forward': 8, 'backward': 8}


@functools.partial(
  jax.jit,
  static_argnames=(
    'inclusive', 'scale', 'dtype', 'operand', 'save', 'interpret',
  ),
)  # fmt: skip
def forward(
  q, k, v, beta, erase, log_decay, state, starts,
  *, inclusive, scale, dtype, operand, save, interpret,
):  # fmt: skip
  """The outputs and the last state.

  Args:
    q: [B, T, K, H].
    k: [B, T, K, H].
    v: [B, T, K, G, V].
    beta: [B, T, K, G, 1].
    erase: r, [B, T, K, G, H], or None for 1.
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
  sizes = sizes_of(q, v, operand, HEADS['forward'])
  blocks = Blocks(sizes, backward=False)
  return forward_pass(
    _body(_forward, sizes, scale, inclusive, erase, starts),
    blocks,
    q if inclusive else past_starts(q, starts),
    k,
    v,
    _gates(beta, log_decay, starts, blocks),
    state,
    [*marked_reads(starts, blocks), *_strengths(erase, blocks)],
    dtype=dtype,
    save=save,
    transposed=True,
    name='delta_rule_channel_forward',
    interpret=interpret,
    cost=(
      CHUNK * (10 * sizes.channels + 2 * sizes.width + CHUNK)
      + 3 * sizes.channels * sizes.width,
      sizes.channels,
    ),
  )


def _body(kernel, sizes, scale, inclusive, erase, starts):
  return functools.partial(
    kernel,
    sizes=sizes,
    scale=scale,
    inclusive=inclusive,
    erases=erase is not None,
    segments=starts is not None,
  )


def _gates(beta, log_decay, starts, blocks):
  """Strengths as [B, programs, chunks * CHUNK, heads], and gates."""
  sizes = blocks.sizes
  shape = (sizes.batch, sizes.programs, sizes.heads, -1)
  beta = by_head(beta, sizes, jnp.float32).reshape(shape)
  return [
    (jnp.swapaxes(beta, 2, 3), blocks.columns(sizes.heads)),
    (
      closed_gate(log_decay, starts, sizes),
      blocks.tokens(sizes.heads, sizes.channels),
    ),
  ]


def _strengths(erase, blocks):
  if erase is None:
    return []
  sizes = blocks.sizes
  return [
    (
      by_head(erase, sizes, erase.dtype),
      blocks.tokens(sizes.heads, sizes.channels),
    )
  ]


def _heads(refs, group, sizes, scale, inclusive):
  """The heads of a group, as (index, beta, beta r, GatedHead)."""
  q_ref, k_ref, beta_ref, gate_ref, erase_ref = refs
  q, k = scaled_queries(q_ref, group, scale), float_keys(k_ref, group)
  for head in range(group * sizes.shared, (group + 1) * sizes.shared):
    beta = beta_ref[0, 0, :, head : head + 1]
    strength = tiles(beta)
    if erase_ref is not None:
      strength = strength * float_keys(erase_ref, head)
    yield (
      head,
      beta,
      strength,
      GatedHead(
        [q, k * strength],
        [k],
        gate_ref[0, head],
        gated=[inclusive, True],
        inclusive=inclusive,
      ),
    )


def _forward(q_ref, k_ref, v_ref, beta_ref, gate_ref, first_ref, *refs,
             sizes, scale, inclusive, erases, segments):  # fmt: skip
  reads_ref, refs = split_refs(refs, segments)
  erase_ref, (out_ref, state_ref, *states_ref) = split_refs(refs, erases)

  load_state(first_ref, state_ref)

  dot = products(sizes.operand)
  refs = q_ref, k_ref, beta_ref, gate_ref, erase_ref
  scores, overlaps, rights, pasts, written, totals = ([] for _ in range(6))
  for group in range(sizes.read):
    for head, beta, _, own in _heads(refs, group, sizes, scale, inclusive):
      (score,), (overlap,) = own.scores(dot)
      past = reading(dot(own.reads(), state_ref[0, head], NT), reads_ref)
      scores.append(score.astype(sizes.operand))
      overlaps.append(overlap)
      rights.append(beta * v_ref[0, head].astype(jnp.float32) - past[CHUNK:])
      pasts.append(past[:CHUNK])
      written.append(own.writes().astype(sizes.operand))
      totals.append(own.total)
  solved = inverses(overlaps, sizes.operand)
  updates = [dot(x, right) for x, right in zip(solved, rights, strict=True)]
  for head, update in enumerate(updates):
    state = state_ref[0, head]
    out = dot(scores[head], update) + pasts[head]
    out_ref[0, head] = out.astype(out_ref.dtype)
    for ref in states_ref:
      ref[0, 0, head] = state.astype(ref.dtype)
    decayed = kept(state, totals[head], segments)
    state_ref[0, head] = decayed + dot(update, written[head], TN)


@functools.partial(
  jax.jit, static_argnames=('inclusive', 'scale', 'operand', 'interpret')
)
def backward(
  q, k, v, beta, erase, log_decay, starts, states, d_out, d_last,
  *, inclusive, scale, operand, interpret,
):  # fmt: skip
  """The cotangents of q, k, v, beta, erase, log_decay and the first state.

  Takes the arguments and the states of `forward`, and the cotangents of its
  outputs and last state.
  """
  sizes = sizes_of(q, v, operand, HEADS['backward'])
  blocks = Blocks(sizes, backward=True)
  heads = sizes.kv_heads * sizes.group
  gates = _gates(beta, log_decay, starts, blocks)
  strengths = _strengths(erase, blocks)
  d_q, d_k, d_v, d_beta, d_gate, *d_erase, d_first = backward_pass(
    _body(_backward, sizes, scale, inclusive, erase, starts),
    blocks,
    q if inclusive else past_starts(q, starts),
    k,
    v,
    gates,
    states,
    [*marked_reads(starts, blocks), *strengths],
    d_out,
    d_last,
    [
      *((x.shape, jnp.float32, spec) for x, spec in gates),
      *((x.shape, x.dtype, spec) for x, spec in strengths),
    ],
    transposed=True,
    name='delta_rule_channel_backward',
    interpret=interpret,
    cost=(
      CHUNK * (35 * sizes.channels + 5 * sizes.width + CHUNK)
      + 5 * sizes.channels * sizes.width,
      2 * sizes.channels,
    ),
  )
  d_beta = jnp.swapaxes(d_beta, 2, 3).reshape(sizes.batch, heads, -1, 1)
  return (
    d_q if inclusive else past_starts(d_q, starts),
    d_k,
    d_v,
    by_token(d_beta, beta),
    by_token(d_erase[0], erase) if d_erase else None,
    gate_cotangent(d_gate, log_decay, starts, sizes),
    d_first,
  )


def _backward(q_ref, k_ref, v_ref, d_out_ref, states_ref,
              beta_ref, gate_ref, last_ref, *refs,
              sizes, scale, inclusive, erases, segments):  # fmt: skip
  reads_ref, refs = split_refs(refs, segments)
  erase_ref, outputs = split_refs(refs, erases)
  d_q_ref, d_k_ref, d_v_ref, d_beta_ref, d_gate_ref, *d_erase, state_ref = (
    outputs
  )

  load_state(last_ref, state_ref)

  dot = products(sizes.operand)
  refs = q_ref, k_ref, beta_ref, gate_ref, erase_ref
  overlaps, rights, d_rights = [], [], []
  for group in range(sizes.read):
    for head, beta, _, own in _heads(refs, group, sizes, scale, inclusive):
      (score,), (overlap,) = own.turned_scores(dot)
      known = dot(own.reads(1), states_ref[0, 0, head], NT)
      right = beta * v_ref[0, head].astype(jnp.float32)
      right = right - reading(known, reads_ref)
      rights.append(right.astype(sizes.operand))
      overlaps.append(overlap)
      d_rights.append(
        dot(score, d_out_ref[0, head])
        + dot(own.writes(), state_ref[0, head], NT)
      )
  solved = inverses(overlaps, sizes.operand, upper=True)
  d_rights = [dot(x, right) for x, right in zip(solved, d_rights, strict=True)]
  updates = [dot(x, right, TN) for x, right in zip(solved, rights, strict=True)]

  lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, sizes.heads), 1)
  d_beta = jnp.zeros(lane.shape, jnp.float32)
  for group in range(sizes.read):
    d_q_sum = d_k_sum = 0
    # The trees again: those of all heads would not fit.
    for head, beta, strength, own in _heads(
      refs, group, sizes, scale, inclusive
    ):
      update, d_right = updates[head], d_rights[head]
      state, d_state = states_ref[0, 0, head], state_ref[0, head]
      d_out, (k,) = d_out_ref[0, head].astype(jnp.float32), own.keys
      both = jnp.concatenate([d_out, -d_right]).astype(sizes.operand)
      d_kept = kept(d_state, own.total, segments)
      state_ref[0, head] = d_kept + dot(both, own.reads(), TN)
      (d_q, d_eraser), (d_k,), d_gate_ref[0, head], _ = own.pull(
        dot(both, update, NT),
        dot(update, both, NT),
        reading(dot(both, state), reads_ref),
        dot(update, d_state),
        jnp.sum(d_kept * state.astype(jnp.float32), 0, keepdims=True),
        [row_products(update, d_out)],
        dot,
      )
      d_v_ref[0, head] = (beta * d_right).astype(d_v_ref.dtype)
      d_q_sum += flat(d_q) * scale
      d_k_sum += flat(d_k + strength * d_eraser)
      of_beta = k * d_eraser
      for ref in d_erase:
        ref[0, head] = (flat(of_beta) * beta).astype(ref.dtype)
        of_beta = of_beta * float_keys(erase_ref, head)
      of_beta = row_products(v_ref[0, head], d_right) + jnp.sum(
        flat(of_beta), 1, keepdims=True
      )
      d_beta = jnp.where(lane == head, of_beta, d_beta)
    d_q_ref[0, group] = d_q_sum.astype(d_q_ref.dtype)
    d_k_ref[0, group] = d_k_sum.astype(d_k_ref.dtype)
  d_beta_ref[0, 0] = d_beta
