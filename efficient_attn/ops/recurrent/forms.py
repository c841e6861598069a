"""How a recurrence is executed: token by token or in chunks.

An op of the linear family is a recurrence over tokens and state, as

  step(state, token) -> (state, out)           one token: the definition
  chunk                                        C tokens in matrix products,
                                               see `chunk_states.Chunk`

`recur` executes either over [B, T, ...] arrays: the forms 'recurrent' and
'chunkwise'; 'parallel' is 'chunkwise' with one chunk, of T x T scores. The
backward pass needs only the T / C states; what happens inside a chunk is
computed again. Accelerators run many chunks at once, see `passes`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from efficient_attn.ops import chunks
from efficient_attn.ops.dispatch import XLA, XLA_PARALLEL
from efficient_attn.ops.per_platform import differentiable, per_platform
from efficient_attn.ops.recurrent import chunk_states

FORMS = ('chunkwise', 'recurrent', 'parallel')
# Where many chunks run at once, and the least tokens of a chunk there: a matrix
# unit has 128 rows.
ACCELERATORS = ('tpu', 'cuda', 'rocm')
WIDE_CHUNK = 128


def choose_form(platform: str, length: int, gradients: bool) -> tuple[str, str]:
  """The form that `form=None` takes, and why.

  Args:
    platform: 'cpu', 'gpu', 'tpu', ...
    length: T.
    gradients: whether the call is differentiated.
  """
  if length == 1:
    return 'recurrent', 'there is one token (T = 1)'
  if gradients:
    return 'chunkwise', 'the backward of the scan keeps a state per token'
  if platform == 'cpu':
    return 'recurrent', 'a CPU runs the plain scan faster without gradients'
  return 'chunkwise', f'a {platform} is fast at matrix products'


class Passes(NamedTuple):
  """Functions of (tokens, state, segment_ids), as `differentiable` has them.

  Attributes:
    call: the outputs and the last state.
    forward: (both, states).
    backward: maps (args, states, cotangents) to the cotangents of args.
  """

  call: Callable
  forward: Callable
  backward: Callable


def passes(
  step: Callable,
  chunk: chunk_states.Chunk,
  *,
  length: int,
  form: str | None,
  chunk_size: int,
  implementation: str | None = None,
  parallel: bool = True,
  span: int | None = None,
  dtype: jnp.dtype | None = None,
) -> tuple[Passes, Passes, Callable]:
  """The passes of 'chunkwise', or None.

  Args:
    step: see `recur`.
    chunk: see `recur`.
    length: T.
    form: 'chunkwise'; or None, for which a CPU without gradients takes the
      step.
    chunk_size: tokens per chunk; an accelerator takes more of them.
    implementation: see `recur`.
    parallel: see `recur`.
    span: tokens between two states that the forward pass keeps, at least
      `chunk_size`; None for `chunk_size`.
    dtype: of the states that are kept, None for their own.

  Returns:
    The passes in general, those of `ACCELERATORS`, and plain JAX for forward
    mode.
  """
  size = chunks.chunk_length(length, chunk_size)
  span = chunks.chunk_length(length, span or chunk_size)

  def of(cut):
    def call(tokens, state, segment_ids):
      return chunk_states.run(chunk, cut, tokens, state, segment_ids)

    def forward(tokens, state, segment_ids):
      out, last, states = chunk_states.forward(
        chunk, cut, tokens, state, segment_ids, span=span, dtype=dtype
      )
      return (out, last), states

    def backward(args, states, cotangents):
      tokens, _, segment_ids = args
      found, first = chunk_states.backward(
        chunk, cut, tokens, segment_ids, states, *cotangents, span=span
      )
      return found, first, None

    return Passes(call, forward, backward)

  if implementation == XLA_PARALLEL:
    found = of(chunk_states.Cut(size, wide=True))
    return found, found, found.call
  general = of(chunk_states.Cut(size, wide=False))
  definition = general.call
  accelerated = general
  if parallel:
    size = chunks.chunk_length(length, max(chunk_size, WIDE_CHUNK))
    accelerated = of(chunk_states.Cut(size, wide=True))
  if form is None:
    general = general._replace(call=functools.partial(_recurrent, step))
  return general, accelerated, definition


def per_accelerator(
  definition: Callable, accelerated: Callable, *args: Any, kernels: Any = None
) -> Any:
  """Calls what `ACCELERATORS` take there, and else the definition."""
  return per_platform(
    definition,
    kernels or {},
    *args,
    partitionable=dict.fromkeys(ACCELERATORS, accelerated),
  )


def recur(
  step: Callable,
  chunk: chunk_states.Chunk,
  tokens: Any,
  state: Any,
  *,
  segment_ids: Int[jax.Array, 'B T'] | None,
  form: str | None,
  chunk_size: int,
  implementation: str | None = None,
  parallel: bool = True,
  dtype: jnp.dtype | None = None,
) -> tuple[Any, Any]:
  """Runs the recurrence in the given form.

  Args:
    step: maps the state and a token [B, ...] to the next state and out.
    chunk: the same for C tokens.
    tokens: pytree of floating [B, T, ..., X] (or [1, T, ..., X]). Tokens of
      zeros, which fill up the last chunk, must leave the state as it is.
    state: pytree of floating [B, ...], the state before token 0. Zeros are the
      state at the start of a segment.
    segment_ids: the state is reset where an id differs from the one before.
    form: one of FORMS; None: by platform, and by whether the call is
      differentiated, see `choose_form`.
    chunk_size: tokens per chunk, a power of two.
    implementation: 'xla_parallel' runs many chunks at once on any platform;
      else accelerators do.
    parallel: whether anything can be gained so.
    dtype: of the states that a gradient keeps, None for their own.

  Returns:
    out: pytree of [B, T, ..., X].
    state: after the last token.
  """
  length = jax.tree.leaves(tokens)[0].shape[1]
  if form == 'recurrent' or (form is None and length == 1):
    return _recurrent(step, tokens, state, segment_ids)
  if form == 'parallel':
    size = 1 << (length - 1).bit_length()
    cut = chunk_states.Cut(size, wide=implementation == XLA_PARALLEL)
    return chunk_states.run(chunk, cut, tokens, state, segment_ids)
  *both, definition = passes(
    step,
    chunk,
    length=length,
    form=form,
    chunk_size=chunk_size,
    implementation=implementation,
    parallel=parallel,
    dtype=dtype,
  )
  chosen = (
    functools.partial(per_accelerator, *functions)
    for functions in zip(*both, strict=True)
  )
  return differentiable(*chosen, definition)(tokens, state, segment_ids)


def check(
  form: str | None,
  implementation: str | None,
  name: str,
  *,
  known: tuple[str, ...] = (XLA, XLA_PARALLEL),
) -> None:
  """Refuses forms and implementations that do not exist."""
  if form is not None and form not in FORMS:
    raise ValueError(f'form = {form!r}: pass one of {FORMS}, or None.')
  if implementation is not None and implementation not in known:
    raise NotImplementedError(
      f'{name} has no implementation {implementation!r}: pass None or'
      f' {" or ".join(map(repr, known))}.'
    )


def reversed_tokens(tree: Any) -> Any:
  """Turns every [B, T, ...] of a pytree around in time."""
  return jax.tree.map(lambda x: jnp.flip(x, 1), tree)


def _recurrent(step, tokens, state, segment_ids):
  starts = None
  if segment_ids is not None:
    starts = chunks.segment_starts(segment_ids)

  def body(state, inputs):
    token, start = inputs
    if start is not None:
      state = jax.tree.map(lambda s: chunk_states.where_rows(~start, s), state)
    return step(state, token)

  inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (tokens, starts))
  state, out = jax.lax.scan(body, state, inputs)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out), state
