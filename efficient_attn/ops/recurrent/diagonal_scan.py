"""Elementwise linear recurrence: a vector state that a gate decays.

  h_t = exp(log_decay_t) * h_{t-1} + x_t,

the recurrence of HGRN (2311.04823) and the RG-LRU (2402.19427). Two steps
(a1, x1), (a2, x2) compose to (a1 a2, x1 a2 + x2), which is associative and
multiplies nothing but decays in [0, 1]: no quotient, no difference, exact for
gates of 0, -1000 and -inf. Inside a chunk it is an associative scan, O(T)
work in O(log C) steps; chunks follow each other, and the backward pass
computes them again, so that only T / C states are kept.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import chunks, dispatch, shapes
from efficient_attn.ops.recurrent import chunk_states, diagonal_kernels, forms

FORMS = ('chunkwise', 'recurrent')


def diagonal_scan(
  x: Float[Array, 'B T N H'],
  *,
  log_decay: Float[Array, 'N H'] | Float[Array, 'B T N H'],
  initial_state: Float[Array, 'B N H'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  bidirectional: bool = False,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B N H'] | None]:
  """h_t = exp(log_decay_t) * h_{t-1} + x_t for every head and channel.

  Args:
    x: inputs.
    log_decay: the gate, <= 0, of each channel or of each token and channel.
      Very negative values and -inf are exact resets.
    initial_state: the state before token 0, part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    bidirectional: the sum of both directions, the own token counted once. A
      pair (i, j) decays by the gates of (j, i] for j < i and of [i, j) for
      j > i.
    form: 'chunkwise' (associative scan in chunks) or 'recurrent' (token by
      token). None: see `in_sequence`.
    chunk_size: tokens per chunk, a power of two.
    implementation: see `linear_attention`; for the kernel see
      `diagonal_kernels`.

  Returns:
    h: [B, T, N, H] in the dtype of x.
    state: [B, N, H] after the last token, float32 (float64 for float64
      inputs); None when `bidirectional`.
  """
  check_form(form, dispatch.XLA, 'diagonal_scan')
  _check(x, log_decay, initial_state, segment_ids, bidirectional)
  dtype = shapes.accumulator(x, log_decay, initial_state)
  state = jnp.zeros((x.shape[0], *x.shape[2:]), dtype)
  if initial_state is not None:
    state = initial_state.astype(dtype)
  if log_decay.ndim == 2:
    log_decay = jnp.broadcast_to(log_decay, (1, *x.shape[1:]))

  def run(x, log_decay, segment_ids):
    return diagonal_kernels.recur(
      step,
      in_sequence(step, chunk, form),
      (x, log_decay, starts(segment_ids)),
      state,
      form=form,
      chunk_size=chunk_size,
      implementation=implementation,
      dtype=dtype if bidirectional else x.dtype,
    )

  h, last = run(x, log_decay, segment_ids)
  if bidirectional:
    backward, _ = run(*forms.reversed_tokens((x, log_decay, segment_ids)))
    h, last = h + jnp.flip(backward, 1) - x, None
  return h.astype(x.dtype), last


def explain_diagonal_scan(
  x: Float[shapes.Shaped, 'B T N H'],
  *,
  log_decay: Float[shapes.Shaped, '...'],
  initial_state: Float[shapes.Shaped, 'B N H'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> str:
  """Says which implementation each platform takes, and why not another.

  Takes arguments of `diagonal_scan`; shapes are enough.
  """
  return dispatch.explain(
    diagonal_kernels.KERNELS,
    implementation,
    op=diagonal_kernels.NAME,
    **diagonal_kernels.request(
      x,
      dtype=shapes.accumulator(x, log_decay, initial_state),
      form=form,
      chunk_size=chunk_size,
    ),
  )


def step(state, token):
  """One token: state, x and log decay [B, N, H], start [B, 1, 1] or None."""
  x, log_decay, start = token
  state = kept(decays(log_decay, start, state.dtype), state)
  state = state + x.astype(state.dtype)
  return state, state


def chunk(state, tokens):
  """C tokens [B, N, C, H]; segments are among the tokens."""
  x, log_decay, start = tokens
  decay = decays(log_decay, start, state.dtype)
  h = associative(decay, x.astype(state.dtype), state)
  return h[:, :, -1], h


def associative(decay: Array, x: Array, state: Array) -> Array:
  """h_t = decay_t h_{t-1} + x_t along axis 2, after `state` without it."""

  def then(first, second):
    return first[0] * second[0], kept(second[0], first[1]) + second[1]

  first = x[:, :, :1] + kept(decay[:, :, :1], state[:, :, None])
  x = jnp.concatenate([first, x[:, :, 1:]], axis=2)
  return jax.lax.associative_scan(then, (decay, x), axis=2)[1]


def kept(decay: Array, state: Array) -> Array:
  """Decays a state; a decay of 0 forgets NaN and infinities too.

  The decay's own gradient is 0 there: it is the exponential of something.
  """
  return decay * jnp.where(decay == 0, 0, state)


def decays(log_decay, start, dtype):
  """exp(log_decay), and nothing where a segment starts."""
  decay = jnp.exp(log_decay.astype(dtype))
  return decay if start is None else jnp.where(start > 0, 0, decay)


def starts(segment_ids: Array | None) -> Array | None:
  """1 where segments start, [B, T, 1, 1]: a token like the others."""
  if segment_ids is None:
    return None
  found = chunks.segment_starts(segment_ids)
  return found[..., None, None].astype(jnp.float32)


def in_sequence(
  step: Callable, chunk: Callable, form: str | None
) -> chunk_states.Chunk:
  """A chunk, where `form=None` knows that a CPU scans tokens faster.

  An associative scan does more work in fewer steps. On a CPU the plain scan
  inside chunks that are computed again takes half its time in a backward pass.
  """

  def by_platform(state, tokens):
    def plain(state, tokens):
      tokens = jax.tree.map(lambda x: jnp.moveaxis(x, -2, 0), tokens)
      state, out = jax.lax.scan(step, state, tokens)
      return state, jnp.moveaxis(out, 0, -2)

    return jax.lax.platform_dependent(state, tokens, cpu=plain, default=chunk)

  run = by_platform if form is None else chunk
  return chunk_states.Chunk(
    prepare=lambda tokens, marks, wide: (tokens, ()),
    advance=lambda state, tokens, marks: run(state, tokens),
    read=lambda out, reads, marks, wide: out,
  )


def check_form(form, implementation, name) -> None:
  """Refuses forms and implementations that do not exist."""
  forms.check(form, implementation, name, known=(dispatch.XLA,))
  if form == 'parallel':
    raise NotImplementedError(
      f'{name} has no parallel form: an elementwise gate is no T x T matrix. '
      f'Pass one of {FORMS}, or None.'
    )


def _check(x, log_decay, initial_state, segment_ids, bidirectional):
  if x.ndim != 4 or x.shape[1] == 0:
    raise ValueError(
      f'x has shape {x.shape}: pass [batch, length >= 1, heads, channels].'
    )
  shapes.check_floating('x', x)
  shapes.check_log_decay(log_decay)
  if log_decay.shape not in (x.shape, x.shape[2:]):
    raise ValueError(
      f'log_decay has shape {log_decay.shape}: pass [N, H] = {x.shape[2:]} or '
      f'[B, T, N, H] = {x.shape}.'
    )
  shapes.check_shapes(
    {
      'initial_state': (initial_state, (x.shape[0], *x.shape[2:])),
      'segment_ids': (segment_ids, x.shape[:2]),
    }
  )
  shapes.check_directions(bidirectional, initial_state)
