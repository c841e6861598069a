"""The delta rule: a write first erases what its key already recalls.

  S' = diag(alpha_t) S_{t-1}
  S_t = S' + beta_t k_t (v_t - S'^T (e_t * k_t))^T,    o_t = scale * S_t^T q_t

with S in R^{H x V} per head. The gate alpha_t = exp(log_decay_t) and the
erase strength e_t tell the methods apart:

  no gate            DeltaNet (2102.11174, 2406.06484)
  scalar gate        Gated DeltaNet (2412.06464)
  channel gate       Kimi Delta Attention (2510.26692)
  e in R^H           GDN-2 (2605.22791): beta = 1, e = b, v = w * v

In a chunk of C tokens the updates u_t = beta_t (v_t - S'^T (e_t * k_t)) obey
(I + L) U = beta (V - decayed (E * K) S_0), where L are the decayed scores of
e * k against k below the diagonal, times beta: one triangular system in
float32 (`triangular`), the rest are the products of linear attention on U.
Time O(T C (H + V + C) + T H V) per head, state O(H V).
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import dispatch, shapes
from efficient_attn.ops.recurrent import (
  chunk_states,
  forms,
  gates,
  matrix_kernels,
  matrix_recurrence,
)


def delta_rule(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T N V'],
  beta: Float[Array, 'B T N'],
  *,
  log_decay: Float[Array, '...'] | None = None,
  erase: Float[Array, 'B T N H'] | None = None,
  scale: shapes.Scalar | None = None,
  initial_state: Float[Array, 'B N H V'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  read: str = 'inclusive',
  bidirectional: bool = False,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N H V'] | None]:
  """S' = diag(alpha) S; S = S' + beta k (v - S'^T (e * k))^T; o = S^T q.

  Args:
    q: queries.
    k: keys, used as given: the state stays bounded while
      beta * (e * k) . k <= 2, so mixers normalise them to |k| = 1.
    v: values; value head n reads query and key head n // (N // K).
    beta: strength of the write, 0 to 1, or to 2 for negative eigenvalues.
    log_decay: the gate, <= 0; its shape says which: [N] constant per head,
      [B, T, N] per token, [B, T, N, H] per key channel.
    erase: e, the strength of erasing per key channel; None is 1.
    scale: factor on the output; None is H ** -0.5.
    initial_state: the state before token 0, part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    read: 'inclusive' reads S_t, 'exclusive' S_{t-1} before the gate.
    bidirectional: the sum of the op on the sequence and on the reversed one.
    form: 'chunkwise', 'recurrent', 'parallel' ('chunkwise' with one chunk) or
      None for what is fastest here, see `choose_form`.
    chunk_size: tokens per chunk, a power of two.
    implementation: see `linear_attention`.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: S [B, N, H, V] after the last token; float32 (float64 for float64
      inputs). None when `bidirectional`.

  Raises:
    ValueError: shapes, dtypes or options that do not fit, and the remedy.
  """
  shapes.check_qkv(q, k, v)
  shapes.check_read(read)
  forms.check(form, dispatch.XLA, 'delta_rule')
  batch, length, heads, _ = v.shape
  shapes.check_shapes(
    {
      'beta': (beta, (batch, length, heads)),
      'erase': (erase, (batch, length, heads, k.shape[-1])),
    }
  )
  shapes.check_floating('beta', beta)
  inclusive = read == 'inclusive'
  if scale is None:
    scale = q.shape[-1] ** -0.5
  # Whether the recurrence gives the output itself, to be scaled and rounded.
  direct = not bidirectional and isinstance(scale, (float, int))
  out, state = matrix_recurrence.recur(
    STEP[inclusive],
    CHUNK[inclusive],
    keys=(q, k),
    values=(v, beta[..., None], erase),
    log_decay=log_decay,
    initial_state=initial_state,
    segment_ids=segment_ids,
    bidirectional=bidirectional,
    form=form,
    chunk_size=chunk_size,
    execute=functools.partial(
      matrix_kernels.recur,
      op='delta_rule',
      inclusive=inclusive,
      implementation=implementation,
      scale=float(scale) if direct else 1.0,
      dtype=v.dtype if direct else None,
    ),
    floor=False,
  )
  if not direct:
    out = matrix_recurrence.scaled(out, scale, q, v)
  return out, state


def explain_delta_rule(
  q: Float[shapes.Shaped, 'B T K H'],
  k: Float[shapes.Shaped, 'B T K H'],
  v: Float[shapes.Shaped, 'B T N V'],
  beta: Float[shapes.Shaped, 'B T N'],
  *,
  log_decay: Float[shapes.Shaped, '...'] | None = None,
  erase: Float[shapes.Shaped, 'B T N H'] | None = None,
  initial_state: Float[shapes.Shaped, 'B N H V'] | None = None,
  read: str = 'inclusive',
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> str:
  """Says which implementation each platform takes, and why not another.

  Takes arguments of `delta_rule`; shapes are enough.
  """
  return matrix_kernels.explain(
    'delta_rule',
    implementation,
    q,
    v,
    *(k, beta, erase, initial_state),
    log_decay=log_decay,
    read=read,
    form=form,
    chunk_size=chunk_size,
  )


def _step(state, token, *, inclusive):
  (q, k), (v, beta, erase), gate = token
  q, k, v, beta = (x.astype(state.dtype) for x in (q, k, v, beta))
  before = state
  if gate is not None:
    state = jnp.exp(gate)[..., None] * state
  eraser = k if erase is None else erase.astype(state.dtype) * k
  known = matrix_recurrence.contract('...h,...hv->...v', eraser, state)
  update = beta * (v - known)
  state = state + k[..., None] * update[..., None, :]
  read = state if inclusive else before
  return state, matrix_recurrence.contract('...h,...hv->...v', q, read)


def _prepare(tokens, marks, *, inclusive, wide):
  (q, k), (v, beta, erase), gate = tokens
  dtype = shapes.accumulator(tokens)
  operand = shapes.operand(dtype, q, k, v)
  decay = gates.ChunkDecay(gate, operand=operand, dtype=dtype, wide=wide)
  q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
  eraser = beta * (k if erase is None else erase.astype(dtype) * k)

  overlap = decay.scores(eraser, k)
  overlap = matrix_recurrence.causal(overlap, marks, diagonal=False)
  known = matrix_recurrence.kept(eraser * decay.before(), marks, 'reads')
  w, u, lower = matrix_recurrence.updates(
    overlap, beta * v, known, operand=operand, wide=wide
  )
  scores = decay.scores(q, k, inclusive=inclusive)
  scores = matrix_recurrence.causal(scores, marks, diagonal=inclusive)
  write = matrix_recurrence.kept(k * decay.after(), marks, 'writes')
  query = q * decay.before(inclusive=inclusive)
  return (
    matrix_recurrence.Writes(
      w, u, lower, write.astype(operand), None, decay.total()
    ),
    matrix_recurrence.Reads(
      query.astype(operand), scores.astype(operand), None
    ),
  )


# By whether a token reads itself: the same functions in every call, so that
# what is traced of them is found again.
STEP = {
  inclusive: functools.partial(_step, inclusive=inclusive)
  for inclusive in (True, False)
}
CHUNK = {
  inclusive: chunk_states.Chunk(
    functools.partial(_prepare, inclusive=inclusive),
    matrix_recurrence.advance,
    matrix_recurrence.read,
  )
  for inclusive in (True, False)
}
