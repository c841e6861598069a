"""The state space of Mamba-3: trapezoidal rule and rotating state (2603.15569).

  h_t = alpha_t h_{t-1} + (1 - l_t) dt_t alpha_t B~_{t-1} x_{t-1}^T
                        + l_t dt_t B~_t x_t^T,          o_t = h_t^T C~_t,

where alpha_t = exp(log_decay_t), l_t in (0, 1) is the weight of the right end
of the step, and B~_t, C~_t are B_t, C_t with the first 2 S channels rotated in
pairs by the angles theta_1 + ... + theta_t: a state with complex decays.

With u_t = B~_t x_t^T and g_t = l_t dt_t, the state without its own token,
s_t = h_t - g_t u_t, is one scalar-gated linear attention over shifted tokens,

  s_t = alpha_t s_{t-1} + ((1 - l_t) dt_t + g_{t-1}) alpha_t u_{t-1},
  o_t = s_t^T C~_t + g_t (C~_t . B~_t) x_t.

Time is O(T C (H + V) + T H V) per head for chunks of C, the state O(H V).
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import chunks, shapes
from efficient_attn.ops.recurrent.linear_attention import linear_attention

State: TypeAlias = tuple[
  Float[Array, 'B N H V'],  # s
  Float[Array, 'B N H'],  # the last rotated key
  Float[Array, 'B N V'],  # the last value
  Float[Array, 'B N'],  # the last g
  Float[Array, 'B N S'],  # the last sum of angles, in [0, 2 pi)
]


def trapezoidal_scan(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T N H'],
  v: Float[Array, 'B T N V'],
  log_decay: Float[Array, 'B T N'],
  dt: Float[Array, 'B T N'],
  right: Float[Array, 'B T N'],
  angles: Float[Array, 'B T N S'],
  *,
  initial_state: State | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], State]:
  """h_t = alpha_t (h_{t-1} + (1 - l_t) dt_t u_{t-1}) + l_t dt_t u_t.

  Args:
    q: C of the state space.
    k: B of the state space.
    v: inputs x.
    log_decay: log alpha <= 0.
    dt: step sizes.
    right: l, the weight of the right end of the step: 1 is the exponential
      Euler rule of Mamba-2, 1/2 the trapezoidal rule.
    angles: theta, what a token adds to the angles of the S <= H / 2 pairs of
      channels (i, i + S).
    initial_state: the state before token 0, part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    form: 'chunkwise', 'recurrent', 'parallel' or None, see `linear_attention`.
    chunk_size: tokens per chunk, a power of two.
    implementation: None or 'xla'.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: see `State`; float32 (float64 for float64 inputs).
  """
  shapes.check_qkv(q, k, v)
  batch, length, heads, channels = k.shape
  pairs = angles.shape[-1]
  per_token = (batch, length, heads)
  states = initial_state or (None,) * 5
  memory = (batch, heads, channels, v.shape[-1])
  shapes.check_shapes(
    {
      'v': (v, (*per_token, v.shape[-1])),
      'log_decay': (log_decay, per_token),
      'dt': (dt, per_token),
      'right': (right, per_token),
      'angles': (angles, (*per_token, pairs)),
      'segment_ids': (segment_ids, (batch, length)),
      'initial_state[0]': (states[0], memory),
      'initial_state[1]': (states[1], memory[:3]),
      'initial_state[2]': (states[2], (*memory[:2], memory[3])),
      'initial_state[3]': (states[3], memory[:2]),
      'initial_state[4]': (states[4], (*memory[:2], pairs)),
    }
  )
  if 2 * pairs > channels:
    raise ValueError(
      f'angles turn {pairs} pairs, but q and k have {channels} channels: pass '
      f'at most {channels // 2}.'
    )
  dtype = shapes.accumulator(q, k, v, log_decay, dt, angles, initial_state)
  log_decay, dt, right = (x.astype(dtype) for x in (log_decay, dt, right))
  if initial_state is None:
    zeros = (memory, memory[:3], (*memory[:2], memory[3]), memory[:2])
    zeros = (*zeros, (*memory[:2], pairs))
    states = tuple(jnp.zeros(shape, dtype) for shape in zeros)
  s, last_k, last_v, last_own, last_angle = states
  starts = None
  if segment_ids is not None:
    starts = chunks.segment_starts(segment_ids)

  turns = _running_angles(angles.astype(dtype), last_angle, starts)
  q, k = (_rotate(x, turns) for x in (q, k))
  own = right * dt
  shifted_k, shifted_v, shifted_own = (
    _shift(x, last, starts)
    for x, last in ((k, last_k), (v, last_v), (own, last_own))
  )
  weight = jnp.exp(log_decay) * ((1 - right) * dt + shifted_own)
  out, s = linear_attention(
    q,
    shifted_k,
    (weight[..., None] * shifted_v).astype(v.dtype),
    log_decay=log_decay,
    scale=1,
    initial_state=s,
    segment_ids=segment_ids,
    form=form,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  scores = jnp.sum(q.astype(dtype) * k.astype(dtype), -1)
  out = out + (own * scores)[..., None] * v
  state = s, k[:, -1], v[:, -1], own[:, -1], turns[:, -1]
  return out.astype(v.dtype), tuple(x.astype(dtype) for x in state)


def _running_angles(angles, initial, starts):
  """Sums of angles since the start of the segment, modulo 2 pi.

  A plain sum would lose the digits of an angle after many turns.
  """
  turn = 2 * jnp.pi
  angles = angles.at[:, 0].add(initial)
  if starts is None:
    return jax.lax.associative_scan(
      lambda a, b: jnp.mod(a + b, turn), jnp.mod(angles, turn), axis=1
    )

  def add(a, b):
    fresh = b[1]
    return jnp.mod(jnp.where(fresh, 0, a[0]) + b[0], turn), a[1] | fresh

  inputs = jnp.mod(angles, turn), starts[..., None, None]
  return jax.lax.associative_scan(add, inputs, axis=1)[0]


def _rotate(x, angles):
  """Turns the pairs of channels (i, i + S) by the S angles."""
  pairs = angles.shape[-1]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([y.astype(x.dtype) for y in turned] + [rest], -1)


def _shift(x, last, starts):
  """The token before each token, zeros at the start of a segment."""
  x = jnp.concatenate([last[:, None].astype(x.dtype), x[:, :-1]], axis=1)
  if starts is None:
    return x
  return jnp.where(starts.reshape(*starts.shape, *[1] * (x.ndim - 2)), 0, x)
