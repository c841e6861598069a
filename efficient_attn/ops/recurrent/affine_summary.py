"""What a span of tokens does to any state: S_out = M S_in + U.

Every recurrence of `linear_attention`, `delta_rule` and `dplr` is affine in
its state, and summaries compose as (M2, U2) o (M1, U1) = (M2 M1, M2 U1 + U2):
the merge of chunks, of devices that hold parts of a sequence, and of prefill
and decode.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import chunks
from efficient_attn.ops.recurrent import gates
from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.ops.recurrent.dplr import dplr
from efficient_attn.ops.recurrent.linear_attention import linear_attention


def affine_summary(
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T N V'],
  *,
  log_decay: Float[Array, '...'] | None = None,
  beta: Float[Array, 'B T N'] | None = None,
  erase: Float[Array, 'B T N H'] | None = None,
  a: Float[Array, 'B T K H'] | None = None,
  b: Float[Array, 'B T K H'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  chunk_size: int = 64,
) -> tuple[Float[Array, '...'], Float[Array, 'B N H V']]:
  """Summarises a span of `delta_rule` (beta), `dplr` (a, b) or neither.

  Args:
    k: see the op, as for the other arguments.
    v: see the op.
    log_decay: see the op.
    beta: given for `delta_rule`.
    erase: for `delta_rule`.
    a: given for `dplr`, with b.
    b: given for `dplr`, with a.
    segment_ids: a boundary inside the span makes M zero.
    chunk_size: see the op.

  Returns:
    M: [B, N, H] for `linear_attention`, where it is diagonal, else
      [B, N, H, H].
    U: [B, N, H, V], the state the span leaves when it starts from zero.

  Raises:
    ValueError: shapes that do not fit, or both beta and a, b.
  """
  if beta is not None and (a is not None or b is not None):
    raise ValueError('beta is of delta_rule, a and b of dplr: pass one kind.')
  options = dict(
    log_decay=log_decay,
    segment_ids=segment_ids,
    form='chunkwise',
    chunk_size=chunk_size,
  )
  if beta is None and a is None:
    _, u = linear_attention(k, k, v, **options)
    return _total_decay(k, v, log_decay, segment_ids, u.dtype), u
  # The columns of M are what becomes of those of the identity.
  batch, length, heads, width = v.shape
  channels = k.shape[-1]
  shape = (batch, heads, channels)
  state = jnp.concatenate(
    [
      jnp.zeros((*shape, width), v.dtype),
      jnp.broadcast_to(jnp.eye(channels, dtype=v.dtype), (*shape, channels)),
    ],
    -1,
  )
  v = jnp.concatenate(
    [v, jnp.zeros((batch, length, heads, channels), v.dtype)], -1
  )
  options['initial_state'] = state
  if beta is None:
    _, state = dplr(k, k, v, a, b, **options)
  else:
    _, state = delta_rule(k, k, v, beta, erase=erase, **options)
  return state[..., width:], state[..., :width]


def _total_decay(k, v, log_decay, segment_ids, dtype):
  batch, length, heads, _ = v.shape
  shape = (batch, heads, k.shape[-1])
  gate = gates.expand_log_decay(
    log_decay, (batch, length, heads, shape[-1]), dtype
  )
  total = jnp.zeros((), dtype) if gate is None else jnp.sum(gate, 1)
  m = jnp.broadcast_to(jnp.exp(total), shape)
  if segment_ids is not None:
    reset = jnp.any(chunks.segment_starts(segment_ids), 1)
    m = jnp.where(reset[:, None, None], 0, m)
  return m
