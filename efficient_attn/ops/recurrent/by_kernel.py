"""Shared parts of the kernels of recurrences.

They are chunkwise, in float32 states, and keep a state every `SPAN` tokens, as
the XLA forms do which stand in where a kernel does not serve.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_attn.ops import dispatch
from efficient_attn.ops.per_platform import differentiable
from efficient_attn.ops.recurrent import chunk_states, forms

SPAN = 128  # tokens between two states that the forward pass keeps


def refuses(
  *, length: int, dtype: jnp.dtype, form: str | None, chunk_size: int
) -> str | None:
  """Returns why no kernel can serve a call, or None."""
  if form not in (None, 'chunkwise'):
    return f"form = {form!r}, it has the form 'chunkwise'"
  if length == 1:
    return 'T = 1, a single step needs no kernel'
  if dtype != jnp.float32:
    return f'the state is {dtype}, it computes in float32'
  if chunk_size > SPAN:
    return f'chunk_size = {chunk_size}, its chunks are of {SPAN} tokens'
  return None


def differentiated(
  xla: Sequence[forms.Passes],
  definition: Callable,
  wrap: forms.Passes,
  kernels: Sequence[Mapping],
) -> Callable:
  """The recurrence by a kernel where there is one, with its gradient.

  Args:
    xla: what `forms.passes` returns, in general and of `ACCELERATORS`.
    definition: what it returns besides.
    wrap: functions that give the passes of `xla`, and the definition, the
      arguments and results of the kernels.
    kernels: by platform, for each of the passes, see `dispatch.kernels`.
  """
  chosen = (
    functools.partial(forms.per_accelerator, *map(wrapped, both), kernels=table)
    for wrapped, both, table in zip(
      wrap, zip(*xla, strict=True), kernels, strict=True
    )
  )
  return differentiable(*chosen, wrap.call(definition))


def with_constants(
  as_saved: Callable = lambda states: states,
  as_states: Callable = lambda saved, constants: saved,
) -> forms.Passes:
  """The `wrap` of a recurrence whose carry is (state, constants).

  Constants are the same for all tokens, but only what a recurrence is given is
  differentiated: in plain JAX they ride along with the state. A kernel takes
  (tokens, state, constants), without segment ids.

  Args:
    as_saved: maps states before chunks to what a kernel saves of them.
    as_states: the inverse, of that and the constants.
  """

  def call(function):
    def run(tokens, state, constants):
      out, (last, _) = function(tokens, (state, constants), None)
      return out, last

    return run

  def forward(function):
    def run(tokens, state, constants):
      carry = state, constants
      (out, (last, _)), (states, _) = function(tokens, carry, None)
      return (out, last), as_saved(states)

    return run

  def backward(function):
    def run(args, saved, cotangents):
      tokens, state, constants = args
      states = as_states(saved, constants)
      count = jax.tree.leaves(states)[0].shape[0]
      of_chunks = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (count, *x.shape)), constants
      )
      d_out, d_last = cotangents
      found, (d_state, d_constants), _ = function(
        (tokens, (state, constants), None),
        (states, of_chunks),
        (d_out, (d_last, jax.tree.map(jnp.zeros_like, constants))),
      )
      return found, d_state, d_constants

    return run

  return forms.Passes(call, forward, backward)


def recur_with_constants(
  table: Mapping[str, dispatch.Implementation],
  rows: Mapping[str | None, str],
  wrap: forms.Passes,
  step: Callable,
  chunk: chunk_states.Chunk,
  tokens: Any,
  state: Any,
  constants: Any,
  *,
  form: str | None,
  chunk_size: int,
) -> tuple[Any, Any]:
  """Does what `forms.recur` does, by a kernel of `rows` where there is one.

  Args:
    table: the implementations.
    rows: the kernel of each platform, see `dispatch.choose`.
    wrap: from `with_constants`.
    step: see `forms.recur`; the carry is (state, constants).
    chunk: see `forms.recur`.
    tokens: see `forms.recur`.
    state: before token 0.
    constants: what is the same for all tokens and has a gradient.
    form: see `forms.recur`.
    chunk_size: see `forms.recur`.

  Returns:
    out and the state after the last token.
  """
  options = dict(form=form, chunk_size=chunk_size, parallel=False)
  if not rows or dispatch.XLA_PARALLEL in rows.values():
    carry = state, constants
    out, (state, _) = forms.recur(
      step, chunk, tokens, carry, segment_ids=None, **options
    )
    return out, state
  length = jax.tree.leaves(tokens)[0].shape[1]
  *xla, definition = forms.passes(
    step, chunk, length=length, span=SPAN, **options
  )
  kernels = [
    dispatch.kernels(table, rows, stage) for stage in forms.Passes._fields
  ]
  function = differentiated(xla, definition, wrap, kernels)
  return function(tokens, state, constants)
