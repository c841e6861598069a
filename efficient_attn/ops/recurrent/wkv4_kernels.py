"""The kernel of wkv4, and which calls it serves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_attn.ops import dispatch
from efficient_attn.ops.recurrent import (
  by_kernel,
  chunk_states,
  diagonal_kernels,
)

NAME = 'wkv4'


def recur(
  step: Callable,
  chunk: chunk_states.Chunk,
  tokens: Any,
  state: Any,
  constants: Any,
  *,
  form: str | None,
  chunk_size: int,
  implementation: str | Sequence[str] | None,
) -> tuple[Any, Any]:
  """Does what `forms.recur` does, by a kernel where one serves the call.

  Args:
    step: see `forms.recur`; the carry is (state, constants).
    chunk: see `forms.recur`.
    tokens: (k, v, present, starts): [B, T, N, H] twice, ones [1, T, 1, 1], and
      [B, T, 1, 1] or None.
    state: sums of values and of weights and their maximum, -inf where there is
      no token, before token 0: [B, N, H] each.
    constants: (log_decay, bonus), [N, H] each.
    form: see `forms.recur`.
    chunk_size: see `forms.recur`.
    implementation: see `dispatch.choose`.

  Returns:
    out: [B, T, N, H] and the state after the last token.
  """
  options = dict(form=form, chunk_size=chunk_size)
  rows = dispatch.choose(
    KERNELS,
    implementation,
    op=NAME,
    **diagonal_kernels.request(tokens[0], dtype=state[0].dtype, **options),
  )
  wrap = by_kernel.with_constants()
  return by_kernel.recur_with_constants(
    KERNELS, rows, wrap, step, chunk, tokens, state, constants, **options
  )


# Pallas takes as long to import as all of this package.
def _arguments(tokens, constants):
  from efficient_attn.kernels.scan import channels

  k, v, _, starts = tokens
  if starts is not None:
    starts = starts[:, :, 0, 0] > 0
  arrays = map(channels.by_group, (k, v))
  return *arrays, *map(channels.of_group, constants), starts


def _call(tokens, state, constants, *, save=False, interpret):
  from efficient_attn.kernels.scan import channels, wkv4

  *arrays, starts = _arguments(tokens, constants)
  out, *states = wkv4.forward(
    *arrays,
    tuple(map(channels.of_group, state)),
    starts,
    save=save,
    interpret=interpret,
  )
  shape = state[0].shape[1:]
  states = jax.tree.map(lambda z: channels.of_head(z, shape), states)
  return channels.by_token(out, tokens[1]), *states


def _forward(*args, **statics):
  out, last, states = _call(*args, save=True, **statics)
  return (out, last), states


def _backward(args, states, cotangents, *, interpret):
  from efficient_attn.kernels.scan import channels, wkv4

  tokens, _, constants = args
  d_out, (*d_sums, d_top) = cotangents
  *arrays, starts = _arguments(tokens, constants)
  d_k, d_v, d_w, d_u, firsts = wkv4.backward(
    *arrays,
    starts,
    tuple(map(channels.of_group, states)),
    channels.by_group(d_out),
    tuple(map(channels.of_group, d_sums)),
    interpret=interpret,
  )
  k, v, *marks = tokens
  d_tokens = (
    channels.by_token(d_k, k),
    channels.by_token(d_v, v),
    *jax.tree.map(jnp.zeros_like, marks),
  )
  of_sequences, firsts = jax.tree.map(
    lambda z: channels.of_head(z, d_top.shape[1:]), ((d_w, d_u), firsts)
  )
  d_constants = tuple(jnp.sum(d, 0) for d in of_sequences)
  return d_tokens, (*firsts, jnp.zeros_like(d_top)), d_constants


KERNELS = {
  'pallas_tpu': dispatch.Implementation(
    call=_call,
    forward=_forward,
    backward=_backward,
    platforms=('tpu',),
    refuses=diagonal_kernels.refuses,
  ),
}
