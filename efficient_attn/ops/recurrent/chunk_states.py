"""The chunkwise form as a forward and a backward pass over saved states.

Autodiff of the chunkwise form keeps the state before every chunk and runs the
chunk again in its backward pass. Here the same two passes stand apart, so that
a kernel can take the place of each: `forward` returns the states before every
span of tokens, `backward` takes them. A span is one or more chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from efficient_attn.ops import chunks
from efficient_attn.ops.recurrent import forms


def forward(
  chunk: Callable,
  tokens: Any,
  state: Array,
  segment_ids: Int[Array, 'B T'] | None,
  *,
  chunk_size: int,
  span: int,
  dtype: jnp.dtype,
) -> tuple[Any, Array, Array]:
  """Runs the chunkwise form and keeps the state before every span.

  Args:
    chunk: see `forms.recur`.
    tokens: see `forms.recur`.
    state: before token 0, [B, ...].
    segment_ids: see `forms.recur`.
    chunk_size: tokens per chunk, a power of two, at most `span`.
    span: tokens between two states, a power of two.
    dtype: of the states that are kept.

  Returns:
    out: of the tokens, see `forms.recur`.
    state: after the last token.
    states: [ceil(T / span), B, ...].
  """
  split, marks, inner = _layout(tokens, segment_ids, chunk_size, span)

  def body(before, inputs):
    after, out = forms.run_chunk(chunk, before, inputs)
    return after, (out, before.astype(dtype))

  last, (out, states) = jax.lax.scan(body, state, (split(tokens), marks))
  length = jax.tree.leaves(tokens)[0].shape[1]
  out = jax.tree.map(lambda x: forms.join_chunks(x, length), out)
  return out, last, states[::inner]


def backward(
  chunk: Callable,
  tokens: Any,
  segment_ids: Int[Array, 'B T'] | None,
  states: Array,
  out: Any,
  last: Array,
  *,
  chunk_size: int,
  span: int,
) -> tuple[Any, Array]:
  """Takes the cotangents of `out` and `last` back to tokens and first state.

  Args:
    chunk: see `forms.recur`.
    tokens: those of `forward`.
    segment_ids: those of `forward`.
    states: what `forward` kept.
    out: the cotangent of the outputs.
    last: the cotangent of the last state.
    chunk_size: as in `forward`.
    span: as in `forward`.

  Returns:
    The cotangents of the tokens and of the state before token 0.
  """
  split, marks, inner = _layout(tokens, segment_ids, chunk_size, span)
  inputs, join = jax.vjp(split, tokens)
  states = states.astype(last.dtype)
  if inner > 1:
    states = _within_spans(chunk, states, (inputs, marks), inner)

  def body(after, inputs):
    tokens, marks, state, out = inputs
    _, pull = jax.vjp(
      lambda *args: forms.run_chunk(chunk, args[0], (args[1], marks)),
      state,
      tokens,
    )
    return pull((after, out))

  first, found = jax.lax.scan(
    body, last, (inputs, marks, states, split(out)), reverse=True
  )
  return join(found)[0], first


def _within_spans(chunk, states, inputs, inner):
  """The states before all chunks from those before every span."""

  def by_place(x):  # all chunks of a span but its last
    return jnp.swapaxes(x.reshape(-1, inner, *x.shape[1:]), 0, 1)[:-1]

  inputs = jax.tree.map(by_place, inputs)
  run = jax.vmap(functools.partial(forms.run_chunk, chunk))

  def body(states, inputs):
    after, _ = run(states, inputs)
    return after, after

  _, within = jax.lax.scan(body, states, inputs)
  states = jnp.concatenate([states[None], within])
  return jnp.swapaxes(states, 0, 1).reshape(-1, *states.shape[2:])


def _layout(tokens, segment_ids, chunk_size, span):
  """A function to [chunks, B, ..., C, X], whole spans; marks; chunks a span."""
  length = jax.tree.leaves(tokens)[0].shape[1]
  span = chunks.chunk_length(length, span)
  size = chunks.chunk_length(span, chunk_size)

  def cut(x, pad='constant'):
    missing = -x.shape[1] % span
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return chunks.to_chunks(jnp.pad(x, widths, mode=pad), size)

  def split(tree):
    return jax.tree.map(lambda x: jnp.moveaxis(cut(x), 2, -2), tree)

  marks = None
  if segment_ids is not None:
    counts = cut(chunks.segment_counts(segment_ids), 'edge')
    marks = counts, chunks.counts_before(counts)
  return split, marks, span // size
