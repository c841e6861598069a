"""How a recurrence is executed: token by token or in chunks.

An op of the linear family is two functions over the same tokens and state:

  step(state, token) -> (state, out)           one token: the definition
  chunk(state, tokens, marks) -> (state, out)  C tokens in matrix products

`run` executes either over [B, T, ...] arrays: the forms 'recurrent' and
'chunkwise'; 'parallel' is 'chunkwise' with one chunk, of T x T scores. The scan
over chunks keeps only the T / C states for the backward pass; what happens
inside a chunk is computed again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from efficient_attn.ops import chunks

FORMS = ('chunkwise', 'recurrent', 'parallel')


class Marks(NamedTuple):
  """Where the segments of a chunk begin and end, as masks.

  Attributes:
    same: [B, C, C], whether two tokens are of one segment.
    reads: [B, C], whether the state before the chunk is of the token's segment.
    writes: [B, C], whether the token's segment is the last of the chunk.
    keeps: [B], whether the state before the chunk lives on after it.
  """

  same: Bool[Array, 'B C C']
  reads: Bool[Array, 'B C']
  writes: Bool[Array, 'B C']
  keeps: Bool[Array, 'B']


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


def recur(
  step: Callable,
  chunk: Callable,
  tokens: Any,
  state: Any,
  *,
  segment_ids: Int[Array, 'B T'] | None,
  form: str | None,
  chunk_size: int,
) -> tuple[Any, Any]:
  """Runs the recurrence in the given form.

  Args:
    step: maps the state and a token [B, ...] to the next state and out.
    chunk: the same for C tokens, which come and go as [B, ..., C, X]: the
      token axis stands second to last. `marks` is None without segments.
    tokens: pytree of [B, T, ..., X] (or [1, T, ..., X]). Tokens of zeros,
      which fill up the last chunk, must leave the state as it is.
    state: pytree of [B, ...], the state before token 0. Zeros are the state
      at the start of a segment.
    segment_ids: the state is reset where an id differs from the one before.
    form: one of FORMS; None: by platform, and by whether the call is
      differentiated, see `choose_form`.
    chunk_size: tokens per chunk, a power of two.

  Returns:
    out: pytree of [B, T, ..., X].
    state: after the last token.
  """
  length = jax.tree.leaves(tokens)[0].shape[1]
  if form == 'parallel':
    chunk_size = 1 << (length - 1).bit_length()
  size = chunks.chunk_length(length, chunk_size)

  executions = {
    'recurrent': functools.partial(_recurrent, step),
    'chunkwise': functools.partial(_chunkwise, chunk, size),
  }
  executions['parallel'] = executions['chunkwise']  # one chunk

  def chosen(platform, gradients):
    return executions[choose_form(platform, length, gradients)[0]]

  if form is not None:
    return executions[form](tokens, state, segment_ids)
  if length == 1:
    return chosen('any', False)(tokens, state, segment_ids)

  @jax.custom_jvp
  def auto(tokens, state, segment_ids):
    return jax.lax.platform_dependent(
      tokens,
      state,
      segment_ids,
      cpu=chosen('cpu', False),
      default=chosen('gpu', False),
    )

  @auto.defjvp
  def differentiated(primals, tangents):
    return jax.jvp(chosen('any', True), primals, tangents)

  return auto(tokens, state, segment_ids)


def check(form: str | None, implementation: str | None, name: str) -> None:
  """Refuses forms and implementations that do not exist."""
  if form is not None and form not in FORMS:
    raise ValueError(f'form = {form!r}: pass one of {FORMS}, or None.')
  if implementation not in (None, 'xla'):
    raise NotImplementedError(
      f"{name} has no implementation {implementation!r}: pass None or 'xla'."
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
      state = jax.tree.map(lambda s: _where(~start, s), state)
    return step(state, token)

  inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (tokens, starts))
  state, out = jax.lax.scan(body, state, inputs)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out), state


def _chunkwise(chunk, size, tokens, state, segment_ids):
  length = jax.tree.leaves(tokens)[0].shape[1]
  tokens = jax.tree.map(
    lambda x: jnp.moveaxis(chunks.to_chunks(x, size), 2, -2), tokens
  )
  marks = None
  if segment_ids is not None:
    counts = chunks.segment_counts(segment_ids)
    counts = chunks.to_chunks(counts, size, pad='edge')
    marks = counts, chunks.counts_before(counts)

  body = functools.partial(run_chunk, chunk)
  if -(-length // size) == 1:
    state, out = body(state, jax.tree.map(lambda x: x[0], (tokens, marks)))
    out = jax.tree.map(lambda x: x[None], out)
  else:
    state, out = jax.lax.scan(jax.checkpoint(body), state, (tokens, marks))

  return jax.tree.map(lambda x: join_chunks(x, length), out), state


def join_chunks(x: Array, length: int) -> Array:
  """[chunks, B, ..., C, X] to [B, T, ..., X]."""
  x = jnp.moveaxis(x, (0, -2), (1, 2))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def run_chunk(chunk: Callable, state: Any, inputs: Any) -> tuple[Any, Any]:
  """Runs one chunk of (tokens, segment counts and the count before them)."""
  tokens, counts = inputs
  if counts is None:
    return chunk(state, tokens, None)
  marks = _marks(*counts)
  # A state that the first token does not read is of a segment that is over.
  # As zeros it reaches no product, whatever it holds.
  state = jax.tree.map(lambda s: _where(marks.reads[:, 0], s), state)
  return chunk(state, tokens, marks)


def _where(rows, state):
  """Keeps the rows [B] of a state [B, ...]; the others are zero."""
  return jnp.where(rows.reshape(-1, *[1] * (state.ndim - 1)), state, 0)


def _marks(counts, previous):
  return Marks(
    same=counts[:, :, None] == counts[:, None, :],
    reads=counts == previous[:, None],
    writes=counts == counts[:, -1:],
    keeps=previous == counts[:, -1],
  )
