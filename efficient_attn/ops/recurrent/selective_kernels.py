"""The kernel of selective_scan, and which calls it serves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from efficient_attn.ops import dispatch
from efficient_attn.ops.recurrent import by_kernel, chunk_states

NAME = 'selective_scan'


def recur(
  step: Callable,
  chunk: chunk_states.Chunk,
  tokens: Any,
  state: Array,
  A: Array,
  *,
  exact: bool,
  form: str | None,
  chunk_size: int,
  implementation: str | Sequence[str] | None,
) -> tuple[Array, Array]:
  """Does what `forms.recur` does, by a kernel where one serves the call.

  Args:
    step: see `forms.recur`; the carry is (state, A).
    chunk: see `forms.recur`.
    tokens: (x, dt, B, C, starts): [B, T, N, H] twice, [B, T, 1, S] twice and
      [B, T, 1, 1] or None.
    state: [B, N, H, S], before token 0.
    A: [N, H, S].
    exact: whether the discretisation is the exact one.
    form: see `forms.recur`.
    chunk_size: see `forms.recur`.
    implementation: see `dispatch.choose`.

  Returns:
    y: [B, T, N, H] and the state after the last token.
  """
  options = dict(form=form, chunk_size=chunk_size)
  rows = dispatch.choose(
    KERNELS,
    implementation,
    op=NAME,
    length=tokens[0].shape[1],
    shape=A.shape,
    dtype=state.dtype,
    exact=exact,
    **options,
  )
  wrap = by_kernel.with_constants(_by_state, _by_channel)
  return by_kernel.recur_with_constants(
    KERNELS, rows, wrap, step, chunk, tokens, state, A, **options
  )


def _by_state(x):
  """[..., N, H, S] to [..., S, N * H], as the kernel has it."""
  x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
  return jnp.swapaxes(x, -1, -2)


def _by_channel(x, A):
  """The inverse."""
  x = jnp.swapaxes(x, -1, -2)
  return x.reshape(*x.shape[:-2], *A.shape)


def _refuses(
  *, shape: tuple[int, int, int], exact: bool, **options: Any
) -> str | None:
  """Returns why the kernel cannot serve a call, or None."""
  if reason := by_kernel.refuses(**options):
    return reason
  heads, channels, states = shape
  if exact:
    return "discretization = 'zoh', it has 'euler'"
  if heads * channels % 128:
    return f'N * H = {heads * channels}, it takes multiples of 128'
  if states % 8 or states > 64:
    return f'S = {states}, it takes multiples of 8 up to 64'
  return None


def _arguments(tokens, A):
  x, dt, B, C, starts = tokens
  if starts is not None:
    starts = starts[:, :, 0, 0] > 0
  flat = (z.reshape(*z.shape[:2], -1) for z in (x, dt))
  return *flat, _by_state(A), B[:, :, 0], C[:, :, 0], starts


def _call(tokens, state, A, *, save=False, interpret):
  # Pallas takes as long to import as all of this package.
  from efficient_attn.kernels.scan import selective

  *arrays, starts = _arguments(tokens, A)
  y, last, *states = selective.forward(
    *arrays,
    _by_state(state),
    starts,
    dtype=state.dtype,
    save=save,
    interpret=interpret,
  )
  return y.reshape(tokens[0].shape), _by_channel(last, A), *states


def _forward(*args, **statics):
  y, last, states = _call(*args, save=True, **statics)
  return (y, last), states


def _backward(args, states, cotangents, *, interpret):
  from efficient_attn.kernels.scan import selective

  tokens, _, A = args
  x, dt, B, C, starts = tokens
  d_y, d_last = cotangents
  *arrays, marks = _arguments(tokens, A)
  d_x, d_dt, d_A, d_B, d_C, first = selective.backward(
    *arrays,
    marks,
    states,
    d_y.reshape(*d_y.shape[:2], -1),
    _by_state(d_last),
    interpret=interpret,
  )
  d_tokens = (
    d_x.reshape(x.shape),
    d_dt.reshape(dt.shape),
    d_B.reshape(B.shape),
    d_C.reshape(C.shape),
    None if starts is None else jnp.zeros_like(starts),
  )
  d_A = _by_channel(jnp.sum(d_A, 0), A)
  return d_tokens, _by_channel(first, A), d_A


KERNELS = {
  'pallas_tpu': dispatch.Implementation(
    call=_call,
    forward=_forward,
    backward=_backward,
    platforms=('tpu',),
    refuses=_refuses,
  ),
}
