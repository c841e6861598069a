"""Additive linear attention: one recurrence for a dozen methods.

  S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,      o_t = scale * S_t^T q_t,

with S in R^{H x V} per head and alpha_t = exp(log_decay_t):

  none           linear attention (2006.16236), with normalize=True
  [N]            RetNet (2307.08621), Lightning attention (2405.17381)
  [B, T, N]      Mamba-2 (2405.21060), mLSTM without its stabiliser
  [B, T, N, H]   GLA (2312.06635), HGRN-2 (2404.07904), RWKV-6 (2404.05892)

Time is O(T C (H + V) + T H V) per head for chunks of C, the state O(H V).
`form='recurrent'` is the definition; the others agree to rounding.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import dispatch, shapes
from efficient_attn.ops.products import product
from efficient_attn.ops.recurrent import (
  additive_steps,
  chunk_states,
  forms,
  matrix_kernels,
  matrix_recurrence,
)

LogDecay: TypeAlias = (
  Float[Array, 'N'] | Float[Array, 'B T N'] | Float[Array, 'B T N H']
)
Memory: TypeAlias = Float[Array, 'B N H V']
NormalizedMemory: TypeAlias = tuple[Memory, Float[Array, 'B N H']]


def linear_attention(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T N V'],
  *,
  log_decay: LogDecay | None = None,
  bonus: Float[Array, 'N H'] | None = None,
  normalize: bool = False,
  scale: shapes.Scalar | None = None,
  initial_state: Memory | NormalizedMemory | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  read: str = 'inclusive',
  bidirectional: bool = False,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, 'B T N V'], Memory | NormalizedMemory | None]:
  """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

  Args:
    q: queries.
    k: keys, used as given.
    v: values; value head n reads query and key head n // (N // K).
    log_decay: the gate, <= 0; its shape says which: [N] constant per head,
      [B, T, N] per token, [B, T, N, H] per key channel. It decays S_{t-1}
      before the write. Very negative values and -inf are exact resets.
    bonus: RWKV's u, the weight of the current token in an exclusive read.
    normalize: divide o_t by q_t . z_t, where z is the same recurrence with
      ones for values (`scale` cancels). Where q_t . z_t is zero, o_t is zero.
    scale: factor on the output; None is H ** -0.5.
    initial_state: the state before token 0, part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    read: 'inclusive' reads S_t. 'exclusive' reads S_{t-1} as it was before
      the gate of token t, as RWKV-6 does:
      o_t = scale * (S_{t-1}^T q_t + (q_t . (bonus * k_t)) v_t).
    bidirectional: every token reads every token of its segment: the op on
      the sequence, plus the op on the reversed sequence, less the diagonal
      counted twice. A pair (i, j) decays by the gates of (j, i] for j < i and
      of [i, j) for j > i, in an exclusive read by those strictly between.
      Normalisation divides the sum of both directions.
    form: 'chunkwise' (O(T), matrix products), 'recurrent' (token by token,
      for decoding and as the definition) or 'parallel' ('chunkwise' with
      one chunk: T x T scores). None takes what is fastest here, see
      `choose_form`.
    chunk_size: tokens per chunk, a power of two; a kernel has its own.
    implementation: 'xla', 'xla_parallel' (see `forms.recur`), the name of a
      kernel in `matrix_kernels.KERNELS` (which is interpreted where it
      cannot be compiled), a sequence of names, of which the first that can is
      used, or None: per platform the first kernel that can, else 'xla'.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: S [B, N, H, V] after the last token, or the pair (S, z) with z
      [B, N, H] when `normalize`; float32 (float64 for float64 inputs). None
      when `bidirectional`.
  """
  _check(q, k, v, bonus, initial_state, segment_ids, normalize)
  _check_options(read, bidirectional, bonus, initial_state)
  forms.check(form, dispatch.XLA, 'linear_attention')
  values, state = v, initial_state
  if normalize:
    values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    if initial_state is not None:
      memory, z = initial_state
      state = jnp.concatenate([memory, z[..., None].astype(memory.dtype)], -1)
  inclusive = read == 'inclusive'
  if scale is None:
    scale = q.shape[-1] ** -0.5
  # Whether the recurrence gives the output itself, to be scaled and rounded.
  direct = not (normalize or bidirectional or bonus is not None)
  direct &= isinstance(scale, (float, int))
  out, state = matrix_recurrence.recur(
    STEP[inclusive],
    CHUNK[inclusive],
    keys=(q, k),
    values=(values,),
    log_decay=log_decay,
    initial_state=state,
    segment_ids=segment_ids,
    bidirectional=bidirectional,
    form=form,
    chunk_size=chunk_size,
    execute=functools.partial(
      matrix_kernels.recur,
      op='linear_attention',
      inclusive=inclusive,
      implementation=implementation,
      scale=float(scale) if direct else 1.0,
      dtype=v.dtype if direct else None,
    ),
    floor=False,
  )
  if direct:
    return out, state
  if bidirectional and inclusive:
    out = out - _own_token(q, k, values, None, out.dtype)
  if bonus is not None:
    out = out + _own_token(q, k, values, bonus, out.dtype)
  if not normalize:
    return matrix_recurrence.scaled(out, scale, q, v), state
  out, norm = out[..., :-1], out[..., -1:]
  out = jnp.where(norm == 0, 0, out / jnp.where(norm == 0, 1, norm))
  if not bidirectional:
    state = state[..., :-1], state[..., -1]
  return out.astype(v.dtype), state


def explain_linear_attention(
  q: Float[shapes.Shaped, 'B T K H'],
  k: Float[shapes.Shaped, 'B T K H'],
  v: Float[shapes.Shaped, 'B T N V'],
  *,
  log_decay: Float[shapes.Shaped, '...'] | None = None,
  normalize: bool = False,
  initial_state: Any = None,
  read: str = 'inclusive',
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> str:
  """Says which implementation each platform takes, and why not another.

  Takes arguments of `linear_attention`; shapes are enough.
  """
  values = jax.ShapeDtypeStruct(
    (*v.shape[:-1], v.shape[-1] + normalize), v.dtype
  )
  return matrix_kernels.explain(
    'linear_attention',
    implementation,
    q,
    values,
    *(k, initial_state),
    log_decay=log_decay,
    read=read,
    form=form,
    chunk_size=chunk_size,
  )


def _step(state, token, *, inclusive):
  (q, k), (v,), gate = token
  token = q[:, :, 0], k[:, :, 0], v, gate
  return additive_steps.step(state, token, inclusive=inclusive)


def _prepare(tokens, marks, *, inclusive, wide):
  (q, k), (v,), gate = tokens
  tokens = q[:, :, 0], k[:, :, 0], v, gate
  return additive_steps.prepare(tokens, marks, inclusive=inclusive, wide=wide)


# By whether a token reads itself: the same functions in every call, so that
# what is traced of them is found again.
STEP = {
  inclusive: functools.partial(_step, inclusive=inclusive)
  for inclusive in (True, False)
}
CHUNK = {
  inclusive: chunk_states.Chunk(
    functools.partial(_prepare, inclusive=inclusive),
    additive_steps.advance,
    additive_steps.read,
  )
  for inclusive in (True, False)
}


def _own_token(q, k, v, bonus, dtype):
  """What a token reads of itself: (q . k) v, or (q . (bonus * k)) v."""
  q, k, values = (x.astype(dtype) for x in (q, k, v))
  kv_heads = q.shape[2]
  if bonus is None:
    weight = jnp.sum(q * k, -1)[..., None]
  else:
    bonus = shapes.group(bonus.astype(dtype), kv_heads, axis=0)
    weight = product('btkh,kgh->btkg', q * k, bonus)
  own = weight[..., None] * shapes.group(values, kv_heads, axis=2)
  return own.reshape(v.shape)


def _check(q, k, v, bonus, initial_state, segment_ids, normalize):
  """The shapes and dtypes of the arrays, with the axis that is wrong."""
  shapes.check_qkv(q, k, v)
  batch, length, _, channels = k.shape
  heads = v.shape[2]
  wanted = {
    'bonus': (bonus, (heads, channels)),
    'segment_ids': (segment_ids, (batch, length)),
  }
  memory = (batch, heads, channels, v.shape[-1])
  if normalize and initial_state is not None:
    if not isinstance(initial_state, tuple) or len(initial_state) != 2:
      raise ValueError(
        'initial_state must be the pair (S, z) with normalize=True: pass the '
        'state a normalised call returned.'
      )
    wanted['initial_state[0]'] = (initial_state[0], memory)
    wanted['initial_state[1]'] = (initial_state[1], memory[:-1])
  elif initial_state is not None:
    if isinstance(initial_state, tuple):
      raise ValueError(
        'initial_state is a tuple, but normalize=False: pass the array S.'
      )
    wanted['initial_state'] = (initial_state, memory)
  shapes.check_shapes(wanted)


def _check_options(read, bidirectional, bonus, initial_state):
  shapes.check_read(read)
  if bonus is not None and read != 'exclusive':
    raise ValueError(
      'bonus is the weight of the current token where the read leaves it out: '
      "pass read='exclusive'."
    )
  shapes.check_directions(bidirectional, initial_state)
