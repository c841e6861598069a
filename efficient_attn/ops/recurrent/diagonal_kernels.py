"""The kernel of diagonal_scan, and which calls it serves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from efficient_attn.ops import dispatch
from efficient_attn.ops.recurrent import by_kernel, chunk_states, forms

NAME = 'diagonal_scan'


def recur(
  step: Callable,
  chunk: chunk_states.Chunk,
  tokens: Any,
  state: Array,
  *,
  form: str | None,
  chunk_size: int,
  implementation: str | Sequence[str] | None,
  dtype: jnp.dtype,
) -> tuple[Array, Array]:
  """Does what `forms.recur` does, by a kernel where one serves the call.

  Args:
    step: see `forms.recur`.
    chunk: see `forms.recur`.
    tokens: (x, log_decay, starts): [B, T, N, H], [B | 1, T, N, H] and
      [B, T, 1, 1] or None.
    state: [B, N, H], before token 0.
    form: see `forms.recur`.
    chunk_size: see `forms.recur`.
    implementation: see `dispatch.choose`.
    dtype: of the output.

  Returns:
    h: [B, T, N, H] and the state after the last token.
  """
  options = dict(form=form, chunk_size=chunk_size)
  rows = dispatch.choose(
    KERNELS,
    implementation,
    op=NAME,
    **request(tokens[0], dtype=state.dtype, **options),
  )
  if not rows or dispatch.XLA_PARALLEL in rows.values():
    h, last = forms.recur(
      step, chunk, tokens, state, segment_ids=None, parallel=False, **options
    )
    return h.astype(dtype), last
  *xla, definition = forms.passes(
    step,
    chunk,
    length=tokens[0].shape[1],
    parallel=False,
    span=by_kernel.SPAN,
    **options,
  )

  def call(function):
    def run(tokens, state):
      h, last = function(tokens, state, None)
      return h.astype(dtype), last

    return run

  def forward(function):
    def run(tokens, state):
      (h, last), states = function(tokens, state, None)
      return (h.astype(dtype), last), states

    return run

  def backward(function):
    def run(args, states, cotangents):
      d_h, d_last = cotangents
      return function(
        (*args, None), states, (d_h.astype(d_last.dtype), d_last)
      )[:2]

    return run

  function = by_kernel.differentiated(
    xla,
    definition,
    forms.Passes(call, forward, backward),
    (
      dispatch.kernels(KERNELS, rows, 'call', dtype=dtype),
      dispatch.kernels(KERNELS, rows, 'forward', dtype=dtype),
      dispatch.kernels(KERNELS, rows, 'backward'),
    ),
  )
  return function(tokens, state)


def request(x: Any, **options: Any) -> dict[str, Any]:
  """Returns what `refuses` reads, of x [B, T, N, H]."""
  return dict(length=x.shape[1], channels=x.shape[2] * x.shape[3], **options)


def refuses(*, channels: int, **options: Any) -> str | None:
  """Returns why a kernel of channels cannot serve a call, or None."""
  if reason := by_kernel.refuses(**options):
    return reason
  if channels < 128:
    return f'N * H = {channels}, it takes 128 and more'
  return None


# Pallas takes as long to import as all of this package.
def _arguments(tokens):
  from efficient_attn.kernels.scan import channels

  x, log_decay, starts = tokens
  if starts is not None:
    starts = starts[:, :, 0, 0] > 0
  return channels.by_group(x), channels.by_group(log_decay), starts


def _call(tokens, state, *, save=False, dtype, interpret):
  from efficient_attn.kernels.scan import channels, diagonal

  x, log_decay, starts = _arguments(tokens)
  h, *states = diagonal.forward(
    x,
    log_decay,
    channels.of_group(state),
    starts,
    dtype=dtype,
    save=save,
    interpret=interpret,
  )
  like = jax.ShapeDtypeStruct(tokens[0].shape, dtype)
  shape = state.shape[1:]
  states = (channels.of_head(z, shape) for z in states)
  return channels.by_token(h, like), *states


def _forward(*args, **statics):
  h, last, states = _call(*args, save=True, **statics)
  return (h, last), states


def _backward(args, states, cotangents, *, interpret):
  from efficient_attn.kernels.scan import channels, diagonal

  tokens, state = args
  d_h, d_last = cotangents
  d_x, d_gate, first = diagonal.backward(
    *_arguments(tokens),
    channels.of_group(states),
    channels.by_group(d_h),
    channels.of_group(d_last),
    interpret=interpret,
  )
  x, log_decay, starts = tokens
  d_tokens = (
    channels.by_token(d_x, x),
    channels.by_token(d_gate, log_decay),
    jax.tree.map(jnp.zeros_like, starts),
  )
  return d_tokens, channels.of_head(first, state.shape[1:])


KERNELS = {
  'pallas_tpu': dispatch.Implementation(
    call=_call,
    forward=_forward,
    backward=_backward,
    platforms=('tpu',),
    refuses=refuses,
  ),
}
