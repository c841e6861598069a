"""The selective state space of Mamba (Gu and Dao, 2312.00752).

Every channel d = (n, h) of head n keeps S numbers, with inputs and outputs
that depend on the token:

  h_t[d, s] = exp(dt_t[d] A[d, s]) h_{t-1}[d, s] + w_t[d, s] B_t[s] x_t[d]
  y_t[d]    = sum_s C_t[s] h_t[d, s] + D[d] x_t[d]

with w = dt ('euler', as Mamba is trained) or w = (exp(dt A) - 1) / A ('zoh',
the exact zero-order hold of the paper). exp(dt A) is no outer product, so
chunks are scans and not matrix products: O(T H S) work. What is as large as
[T, H, S] exists per chunk only.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import dispatch, shapes
from efficient_attn.ops.recurrent import selective_kernels
from efficient_attn.ops.recurrent.diagonal_scan import (
  associative,
  check_form,
  in_sequence,
  kept,
  starts,
)
from efficient_attn.values import ConfigError

DISCRETIZATIONS = ('euler', 'zoh')
# Where the series replaces expm1(z) / z, whose derivative cancels near zero.
SERIES_BELOW = 0.1
SERIES_TERMS = 11


def selective_scan(
  x: Float[Array, 'B T N H'],
  dt: Float[Array, 'B T N H'],
  A: Float[Array, 'N H S'],
  B: Float[Array, 'B T S'],
  C: Float[Array, 'B T S'],
  D: Float[Array, 'N H'] | None = None,
  *,
  discretization: str = 'euler',
  initial_state: Float[Array, 'B N H S'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B N H S']]:
  """The recurrence of the module docstring.

  Args:
    x: inputs; the channels of the model in heads, which are independent.
    dt: step sizes, >= 0.
    A: continuous decay, <= 0.
    B: what a token writes, shared by all channels.
    C: what a token reads.
    D: the skip connection of each channel.
    discretization: 'euler' (w = dt) or 'zoh' (w = (exp(dt A) - 1) / A).
    initial_state: the state before token 0, part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    form: 'chunkwise', 'recurrent' or None, as in `diagonal_scan`.
    chunk_size: tokens per chunk, a power of two.
    implementation: see `linear_attention`; for the kernel see
      `selective_kernels`.

  Returns:
    y: [B, T, N, H] in the dtype of x.
    state: [B, N, H, S] after the last token, float32 (float64 for float64
      inputs).
  """
  check_form(form, dispatch.XLA, 'selective_scan')
  _check(x, dt, A, B, C, D, initial_state, segment_ids)
  if discretization not in DISCRETIZATIONS:
    raise ConfigError(
      f'discretization = {discretization!r}: pass one of {DISCRETIZATIONS}.'
    )
  dtype = shapes.accumulator(x, dt, A, B, C, D, initial_state)
  state = jnp.zeros((x.shape[0], *A.shape), dtype)
  if initial_state is not None:
    state = initial_state.astype(dtype)
  A = A.astype(dtype)
  exact = discretization == 'zoh'

  # A is the same for all tokens, but `forms.recur` differentiates only what it
  # is given: it rides along with the state.
  def step(carry, token):
    state, A = carry
    decay, write, read = _discrete(A, token, exact)
    state = kept(decay, state) + write
    return (state, A), _read(state, read)

  def chunk(carry, tokens):
    state, A = carry
    decay, write, read = _discrete(A[:, None], tokens, exact)
    states = associative(decay, write, state)
    return (states[:, :, -1], A), _read(states, read)

  tokens = x, dt, B[:, :, None], C[:, :, None], starts(segment_ids)
  y, state = selective_kernels.recur(
    step,
    in_sequence(step, chunk, form),
    tokens,
    state,
    A,
    exact=exact,
    form=form,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  if D is not None:
    y = y + D.astype(dtype) * x.astype(dtype)
  return y.astype(x.dtype), state


def explain_selective_scan(
  x: Float[shapes.Shaped, 'B T N H'],
  dt: Float[shapes.Shaped, 'B T N H'],
  A: Float[shapes.Shaped, 'N H S'],
  *,
  discretization: str = 'euler',
  initial_state: Float[shapes.Shaped, 'B N H S'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> str:
  """Says which implementation each platform takes, and why not another.

  Takes arguments of `selective_scan`; shapes are enough.
  """
  return dispatch.explain(
    selective_kernels.KERNELS,
    implementation,
    op=selective_kernels.NAME,
    length=x.shape[1],
    shape=A.shape,
    dtype=shapes.accumulator(x, dt, A, initial_state),
    exact=discretization == 'zoh',
    form=form,
    chunk_size=chunk_size,
  )


def _discrete(A, tokens, exact):
  """Decay and write [..., H, S] and read [..., S] of tokens [..., H]."""
  x, dt, B, C, start = tokens
  x, dt, B, C = (z.astype(A.dtype) for z in (x, dt, B, C))
  exponent = dt[..., None] * A
  decay = jnp.exp(exponent)
  if start is not None:
    decay = jnp.where(start[..., None] > 0, 0, decay)
  write = (dt * x)[..., None] * B[..., None, :]
  if exact:
    write = write * expm1_ratio(exponent)
  return decay, write, C


def _read(state, C):
  return jnp.einsum(
    '...hs,...s->...h',
    state,
    jnp.broadcast_to(C, (*state.shape[:-2], C.shape[-1])),
    precision=jax.lax.Precision.HIGHEST,
  )


def expm1_ratio(z: Float[Array, '...']) -> Float[Array, '...']:
  """(exp(z) - 1) / z and its derivatives, also near and at zero."""
  small = jnp.abs(z) < SERIES_BELOW
  near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
  series = jnp.ones_like(z)
  for n in range(SERIES_TERMS, 1, -1):
    series = 1 + near / n * series
  return jnp.where(small, series, jnp.expm1(far) / far)


def _check(x, dt, A, B, C, D, initial_state, segment_ids):
  if x.ndim != 4 or x.shape[1] == 0:
    raise ValueError(
      f'x has shape {x.shape}: pass [batch, length >= 1, heads, channels].'
    )
  if A.ndim != 3:
    raise ValueError(f'A has shape {A.shape}: pass [heads, channels, states].')
  batch, length, *channels = x.shape
  states = A.shape[-1]
  shapes.check_shapes(
    {
      'dt': (dt, x.shape),
      'A': (A, (*channels, states)),
      'B': (B, (batch, length, states)),
      'C': (C, (batch, length, states)),
      'D': (D, (*channels,)),
      'initial_state': (initial_state, (batch, *channels, states)),
      'segment_ids': (segment_ids, (batch, length)),
    }
  )
  for name, array in dict(x=x, dt=dt, A=A, B=B, C=C).items():
    shapes.check_floating(name, array)
  for name, wrong, remedy in (
    ('dt', -dt, 'dt = jax.nn.softplus(.)'),
    ('A', A, 'A = -jnp.exp(A_log)'),
  ):
    if not isinstance(wrong, jax.core.Tracer) and jnp.any(wrong > 0):
      raise ValueError(
        f'{name} has the wrong sign, a state that grows: pass {remedy}.'
      )
