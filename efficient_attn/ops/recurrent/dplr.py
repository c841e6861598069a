"""Diagonal plus low rank transitions, the normal form of the delta family.

  S_t = diag(alpha_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
  o_t = scale * S_t^T q_t

with S in R^{H x V} per head: RWKV-7 (2503.14456) with a = -kappa and
b = kappa * strength; Comba (2506.02475), whose erase reads the state before it
decays, with a = p and b = -beta k; every delta rule is the case
a = alpha * e * k, b = -beta k with values beta v.

In a chunk what the rank-one terms recall, y_t = a_t^T S_{t-1}, obeys
(I - L_ab) Y = decayed A S_0 + L_ak V with L the decayed scores below the
diagonal. Time O(T C (H + V + C) + T H V) per head, state O(H V).
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


def dplr(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T N V'],
  a: Float[Array, 'B T K H'],
  b: Float[Array, 'B T K H'],
  *,
  log_decay: Float[Array, '...'] | None = None,
  scale: shapes.Scalar | None = None,
  initial_state: Float[Array, 'B N H V'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  read: str = 'inclusive',
  bidirectional: bool = False,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N H V'] | None]:
  """S_t = diag(alpha) S_{t-1} + b (a^T S_{t-1}) + k v^T; o_t = scale S_t^T q.

  Args:
    q: queries.
    k: keys of the additive write.
    v: values; value head n reads query and key head n // (N // K).
    a: what the rank-one term reads, before the gate of its token.
    b: where it writes; the state stays bounded while |diag(alpha) + b a^T|
      does.
    log_decay: see `delta_rule`.
    scale: see `delta_rule`.
    initial_state: see `delta_rule`.
    segment_ids: see `delta_rule`.
    read: see `delta_rule`.
    bidirectional: see `delta_rule`.
    form: see `delta_rule`.
    chunk_size: see `delta_rule`.
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
  shapes.check_shapes({'a': (a, k.shape), 'b': (b, k.shape)})
  shapes.check_floating('a', a)
  shapes.check_floating('b', b)
  forms.check(form, dispatch.XLA, 'dplr')
  inclusive = read == 'inclusive'
  if scale is None:
    scale = q.shape[-1] ** -0.5
  # Whether the recurrence gives the output itself, to be scaled and rounded.
  direct = not bidirectional and isinstance(scale, (float, int))
  out, state = matrix_recurrence.recur(
    STEP[inclusive],
    CHUNK[inclusive],
    keys=(q, k, a, b),
    values=(v,),
    log_decay=log_decay,
    initial_state=initial_state,
    segment_ids=segment_ids,
    bidirectional=bidirectional,
    form=form,
    chunk_size=chunk_size,
    execute=functools.partial(
      matrix_kernels.recur,
      op='dplr',
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


def explain_dplr(
  q: Float[shapes.Shaped, 'B T K H'],
  k: Float[shapes.Shaped, 'B T K H'],
  v: Float[shapes.Shaped, 'B T N V'],
  a: Float[shapes.Shaped, 'B T K H'],
  b: Float[shapes.Shaped, 'B T K H'],
  *,
  log_decay: Float[shapes.Shaped, '...'] | None = None,
  initial_state: Float[shapes.Shaped, 'B N H V'] | None = None,
  read: str = 'inclusive',
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> str:
  """Says which implementation each platform takes, and why not another.

  Takes arguments of `dplr`; shapes are enough.
  """
  return matrix_kernels.explain(
    'dplr',
    implementation,
    q,
    v,
    *(k, a, b, initial_state),
    log_decay=log_decay,
    read=read,
    form=form,
    chunk_size=chunk_size,
  )


def _step(state, token, *, inclusive):
  (q, k, a, b), (v,), gate = token
  q, k, a, b, v = (x.astype(state.dtype) for x in (q, k, a, b, v))
  before = state
  recalled = matrix_recurrence.contract('...h,...hv->...v', a, state)
  if gate is not None:
    state = jnp.exp(gate)[..., None] * state
  state = state + b[..., None] * recalled[..., None, :]
  state = state + k[..., None] * v[..., None, :]
  read = state if inclusive else before
  return state, matrix_recurrence.contract('...h,...hv->...v', q, read)


def _prepare(tokens, marks, *, inclusive, wide):
  (q, k, a, b), (v,), gate = tokens
  dtype = shapes.accumulator(tokens)
  operand = shapes.operand(dtype, q, k, a, b, v)
  dot = matrix_recurrence.products(operand, dtype)
  decay = gates.ChunkDecay(gate, operand=operand, dtype=dtype, wide=wide)
  q, k, a, b, v = (x.astype(dtype) for x in (q, k, a, b, v))

  def scores(x, y, *, inclusive):
    found = decay.scores(x, y, inclusive=inclusive)
    return matrix_recurrence.causal(found, marks, diagonal=inclusive)

  def write(x):
    x = matrix_recurrence.kept(x * decay.after(), marks, 'writes')
    return x.astype(operand)

  recalled = a * decay.before(inclusive=False)
  w, u, lower = matrix_recurrence.updates(
    -scores(a, b, inclusive=False),
    dot('...ij,...jv->...iv', scores(a, k, inclusive=False), v),
    -matrix_recurrence.kept(recalled, marks, 'reads'),
    operand=operand,
    wide=wide,
  )
  query = q * decay.before(inclusive=inclusive)
  inside = dot('...ij,...jv->...iv', scores(q, k, inclusive=inclusive), v)
  read = scores(q, b, inclusive=inclusive)
  return (
    matrix_recurrence.Writes(
      w, u, lower, write(b), (write(k), v.astype(operand)), decay.total()
    ),
    matrix_recurrence.Reads(
      query.astype(operand), read.astype(operand), inside
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
