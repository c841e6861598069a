"""The Mesa layer (von Oswald et al. 2506.05233): least squares at every token.

  A_t = alpha_t A_{t-1} + beta_t k_t k_t^T          alpha_t = exp(log_decay_t)
  S_t = alpha_t S_{t-1} + beta_t k_t v_t^T
  o_t = S_t^T (A_t + diag(ridge))^-1 q_t,

the prediction at q_t of the linear map that fits the values to the keys best,
with weights that decay. `form='recurrent'`, the definition, factorises a
matrix at every token. In chunks the systems of all tokens are solved at once
by conjugate gradients, whose product A_t x_t is a read of linear attention
with x for queries and keys for values. Their number is fixed: `num_steps` >= H
are exact up to rounding, and 30 are enough for well-conditioned keys.
Derivatives solve the same systems once more. O(T (C + H) H num_steps) time,
O(H (H + V)) state.
"""

import functools
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from efficient_attn.ops import shapes
from efficient_attn.ops.recurrent import chunk_states, forms, gates
from efficient_attn.values import ConfigError

Moments: TypeAlias = tuple[Float[Array, 'B N H H'], Float[Array, 'B N H V']]


def mesa_recurrence(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T N V'],
  *,
  log_decay: Float[Array, 'B T N'],
  beta: Float[Array, 'B T N'],
  ridge: Float[Array, 'N H'],
  initial_state: Moments | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  num_steps: int = 30,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Moments]:
  """Regularised least squares of values on keys, read at the queries.

  Args:
    q: queries.
    k: keys, of unit norm for systems that are well conditioned.
    v: values; value head n reads query and key head n // (N // K).
    log_decay: <= 0 per token; it decays what is before the token.
    beta: >= 0, the weight of a token in the fit.
    ridge: > 0, the diagonal that is added to A.
    initial_state: (A, S) before token 0, part of the first segment; A must be
      symmetric and positive semidefinite.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    num_steps: of conjugate gradients, except in the recurrent form.
    form: 'chunkwise', 'recurrent', 'parallel' or None, see
      `linear_attention`.
    chunk_size: tokens per chunk, a power of two.
    implementation: None, 'xla' or 'xla_parallel', see `forms.recur`.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: (A, S) after the last token, float32 (float64 for float64 inputs).
  """
  _check(q, k, v, log_decay, beta, ridge, initial_state, segment_ids)
  forms.check(form, implementation, 'mesa')
  if num_steps < 1:
    raise ConfigError(f'num_steps = {num_steps}: pass at least 1.')
  batch, length, kv_heads, channels = k.shape
  heads, width = v.shape[2:]
  dtype = shapes.accumulator(q, k, v, log_decay, beta, ridge, initial_state)
  gate = gates.expand_log_decay(
    log_decay, (batch, length, heads, channels), dtype
  )
  if initial_state is None:
    shape = (batch, heads, channels)
    initial_state = (
      jnp.zeros((*shape, channels), dtype),
      jnp.zeros((*shape, width), dtype),
    )
  state = tuple(
    shapes.group(s.astype(dtype), kv_heads, axis=1) for s in initial_state
  )
  # The same for all tokens, but a token: it must not be a constant of a scan
  # that is differentiated by hand.
  ridge = jnp.broadcast_to(ridge, (1, length, heads, channels))
  tokens = (q.astype(dtype), k.astype(dtype)) + tuple(
    shapes.group(x.astype(dtype), kv_heads, axis=2)
    for x in (v, gate, beta[..., None], ridge)
  )
  out, state = forms.recur(
    _step,
    chunk_states.Chunk(
      _prepare, _advance, functools.partial(_read, num_steps=num_steps)
    ),
    tokens,
    state,
    segment_ids=segment_ids,
    form=form,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  out = out.reshape(batch, length, heads, width).astype(v.dtype)
  return out, tuple(s.reshape(batch, heads, *s.shape[3:]) for s in state)


def _dot(spec, *operands):
  # Steps of a solver: half precision would stop it early.
  return jnp.einsum(spec, *operands, precision=lax.Precision.HIGHEST)


def _step(state, token):
  """q, k [B,K,H], v [B,K,G,V], gate, beta [B,K,G,1], ridge [1,K,G,H]."""
  q, k, v, gate, beta, ridge = token
  key, write = k[:, :, None, :, None], beta[..., None]
  alpha = jnp.exp(gate)[..., None]
  fit, memory = state
  fit = alpha * fit + write * key * k[:, :, None, None, :]
  memory = alpha * memory + write * key * v[..., None, :]
  system = fit + ridge[..., None] * np.eye(k.shape[-1])
  q = jnp.broadcast_to(q[:, :, None], system.shape[:-1])
  x = jnp.linalg.solve(system, q[..., None])[..., 0]
  return (fit, memory), _dot('bkgh,bkghv->bkgv', x, memory)


def _prepare(tokens, marks, *, wide):
  """What C tokens [B, K, (G,) C, X] write, and the decays they read with."""
  q, k, v, gate, beta, ridge = tokens
  spans, before, after = gates.span_sums(gate[..., 0], wide=wide)
  mask = np.tri(k.shape[-2], dtype=bool)
  if marks is not None:
    mask &= marks.same[:, None, None]
    before = jnp.where(marks.reads[:, None, None], before, -jnp.inf)
    after = jnp.where(marks.writes[:, None, None], after, -jnp.inf)
  # The exponent is masked, not the decay.
  decay = jnp.exp(jnp.where(mask, spans, -jnp.inf))
  decay = decay * jnp.swapaxes(beta, -1, -2)
  before, after = jnp.exp(before)[..., None], jnp.exp(after)[..., None]
  writes = k, v, after * beta, _total(gate, marks)
  return writes, (q, k, v, decay, before, ridge)


def _advance(state, writes, marks):
  """The moments after a chunk, and before it for its reads."""
  del marks
  k, v, weight, kept = writes
  fit, memory = state
  keys = weight * k[:, :, None]
  after = (
    kept * fit + _dot('bkjh,bkgje->bkghe', k, keys),
    kept * memory + _dot('bkjh,bkgjv->bkghv', k, weight * v),
  )
  return after, state


def _read(seen, reads, marks, *, num_steps, wide):
  """The systems of C tokens, solved at once."""
  del marks, wide
  fit, memory = seen
  q, k, v, decay, before, ridge = reads

  def read(x, values, state):
    scores = _dot('bkgih,bkjh->bkgij', x, k) * decay
    inside = _dot('bkgij,bkgjv->bkgiv', scores, values)
    return inside + _dot('bkgih,bkghv->bkgiv', before * x, state)

  keys = jnp.broadcast_to(k[:, :, None], (*v.shape[:-1], k.shape[-1]))
  x = lax.custom_linear_solve(
    lambda x: ridge * x + read(x, keys, fit),
    jnp.broadcast_to(q[:, :, None], keys.shape),
    functools.partial(_conjugate_gradients, num_steps=num_steps),
    symmetric=True,
  )
  return read(x, v, memory)


def _total(gate, marks):
  """The decay of the state over the chunk, zero where a segment ends."""
  total = jnp.sum(gate, axis=-2)[..., None]
  if marks is not None:
    keeps = marks.keeps[:, None, None, None, None]
    total = jnp.where(keeps, total, -jnp.inf)
  return jnp.exp(total)


def _conjugate_gradients(matvec, b, *, num_steps):
  """Solves many systems at once, one per row of the last axis."""

  def square(x, y):
    return jnp.sum(x * y, axis=-1, keepdims=True)

  def ratio(x, y):  # of squares; a solved system stays as it is
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)

  def step(_, carry):
    x, residual, direction, size = carry
    image = matvec(direction)
    along = ratio(size, square(direction, image))
    x = x + along * direction
    residual = residual - along * image
    new = square(residual, residual)
    return x, residual, residual + ratio(new, size) * direction, new

  start = jnp.zeros_like(b), b, b, square(b, b)
  return lax.fori_loop(0, num_steps, step, start)[0]


def _check(q, k, v, log_decay, beta, ridge, state, segment_ids):
  shapes.check_qkv(q, k, v)
  batch, length, heads, width = v.shape
  channels = k.shape[-1]
  wanted = {
    'log_decay': (log_decay, (batch, length, heads)),
    'beta': (beta, (batch, length, heads)),
    'ridge': (ridge, (heads, channels)),
    'segment_ids': (segment_ids, (batch, length)),
  }
  if state is not None:
    shape = (batch, heads, channels)
    wanted['initial_state[0]'] = (state[0], (*shape, channels))
    wanted['initial_state[1]'] = (state[1], (*shape, width))
  shapes.check_shapes(wanted)
