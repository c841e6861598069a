"""Learners that take the gradients of a mini-batch at one point.

A mini-batch is C tokens, counted from the first token of their own segment.
Its gradients are those at the weights from before it, whatever chunks, calls
or packed rows the sequence is cut into. An op is two functions:

  begin(carry) -> carry                        the next mini-batch begins
  learn(carry, tokens, seen) -> (carry, out)   tokens of one mini-batch

A chunk of at most C tokens holds up to three groups of tokens, which `learn`
takes one after the other, the others masked: what is left of the mini-batch
that was under way, the next one of the same segment, and the first ones of
the segments that begin inside. Where sequences begin with the chunks (no
state, no segments) only the first group exists.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from efficient_attn.ops import chunks

FORMS = ('chunkwise', 'recurrent')


def check(form: str | None, implementation: str | None, name: str) -> None:
  """Refuses forms and implementations that do not exist."""
  if form == 'parallel':
    raise NotImplementedError(
      f"{name} has no form 'parallel', because mini-batches follow each other: "
      f'pass one of {FORMS}, or None.'
    )
  if form is not None and form not in FORMS:
    raise ValueError(f'form = {form!r}: pass one of {FORMS}, or None.')
  if implementation not in (None, 'xla'):
    raise NotImplementedError(
      f"{name} has no implementation {implementation!r}: pass None or 'xla'."
    )


def places(
  length: int,
  count: Int[Array, 'B'] | None,
  segment_ids: Int[Array, 'B T'] | None,
  chunk_size: int,
) -> Int[Array, '#B T']:
  """Returns the place of each token in its mini-batch, 0 to chunk_size - 1.

  Args:
    length: T.
    count: tokens of the mini-batch under way before the first token, as a
      state holds them; None for 0.
    segment_ids: as in `run`.
    chunk_size: tokens per mini-batch.
  """
  index = jnp.arange(length)[None]
  found = index if count is None else index + count[:, None]
  if segment_ids is not None:
    starts = chunks.segment_starts(segment_ids)
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    found = jnp.where(first > 0, index - first, found)
  return found % chunk_size


def recur(
  begin: Callable,
  learn: Callable,
  tokens: Any,
  fresh: Any,
  state: tuple[Any, Int[Array, 'B']] | None,
  *,
  segment_ids: Int[Array, 'B T'] | None,
  form: str | None,
  chunk_size: int,
) -> tuple[Array, tuple[Any, Int[Array, 'B']]]:
  """Runs a learner over tokens.

  Args:
    begin: the carry at the first token of a mini-batch, from the carry after
      the last token of the one before. It must not change `fresh`.
    learn: for C tokens of one mini-batch, or the first tokens of several
      segments. Tokens come as [B, ..., C, X], out goes back so. `seen`
      [B|1, C, C] says which tokens (columns) the weights that token t (row)
      is read with have learned; the carry after is that of the last row, where
      only tokens that see themselves count.
    tokens: pytree of [B, T, ..., X].
    fresh: pytree of [B, ...], the carry at the start of a segment.
    state: a carry and how many tokens of its mini-batch [B] it has seen, 0 to
      `chunk_size`; None for `fresh` and 0.
    segment_ids: a token whose id differs from the one before starts fresh.
    form: 'chunkwise', 'recurrent' (chunks of one token) or None: the second
      for a single token.
    chunk_size: tokens per mini-batch, a power of two.

  Returns:
    out: [B, T, ..., X].
    state: the carry after the last token, and its count.
  """
  batch, length = jax.tree.leaves(tokens)[0].shape[:2]
  size = chunks.chunk_length(length, chunk_size)
  if form == 'recurrent':
    size = 1
  aligned = state is None and segment_ids is None
  aligned = aligned and (size == chunk_size or size >= length)

  cut = jax.tree.map(
    lambda x: jnp.moveaxis(chunks.to_chunks(x, size), 2, -2), tokens
  )
  live = np.arange(-(-length // size) * size).reshape(-1, size) < length
  marks = None
  if segment_ids is not None:
    counts = chunks.segment_counts(segment_ids)
    starts = chunks.segment_starts(segment_ids)
    marks = (
      chunks.to_chunks(counts, size, pad='edge'),
      chunks.to_chunks(starts, size)[:, :, 0],
    )

  def one_mini_batch(state, inputs):
    tokens, live, _ = inputs
    seen = np.tri(size, dtype=bool) & live
    carry, out = learn(begin(state[0]), tokens, seen[None])
    count = jnp.sum(live, dtype=jnp.int32)
    return (carry, jnp.full_like(state[1], count)), out

  def groups(state, inputs):
    return _groups(begin, learn, fresh, chunk_size, state, inputs)

  body = one_mini_batch if aligned else groups
  if state is None:
    state = fresh, jnp.zeros(batch, jnp.int32)
  inputs = cut, jnp.asarray(live), marks
  if len(live) == 1:
    state, out = body(state, jax.tree.map(lambda x: x[0], inputs))
    out = out[None]
  else:
    state, out = jax.lax.scan(jax.checkpoint(body), state, inputs)
  out = jnp.moveaxis(out, (0, -2), (1, 2))
  return out.reshape(batch, -1, *out.shape[3:])[:, :length], state


def _groups(begin, learn, fresh, chunk_size, state, inputs):
  """One chunk whose tokens may be of several mini-batches."""
  carry, count = state
  tokens, live, marks = inputs
  size = live.shape[0]
  entering = jnp.ones((count.shape[0], size), bool)
  if marks is not None:
    numbers, starts = marks
    carry, count = select(starts, (fresh, jnp.zeros_like(count)), state)
    entering = numbers == numbers[:, :1]
  full = count == chunk_size
  carry = _begin_where(full, begin, carry, rare=size == 1)
  count = jnp.where(full, 0, count)

  def group(carry, members):
    seen = np.tri(size, dtype=bool) & (members & live)[:, None]
    return learn(carry, tokens, seen)

  def choose(members, x, y):
    return jnp.where(members.reshape(-1, *[1] * (x.ndim - 3), size, 1), x, y)

  rest = entering & (np.arange(size) < (chunk_size - count)[:, None])
  carry, out = group(carry, rest)
  count = count + jnp.sum(entering & live, 1, dtype=jnp.int32)
  if size == 1:
    return (carry, count), out

  over = count > chunk_size
  following, later = group(begin(carry), entering & ~rest)
  carry = select(over, following, carry)
  count = jnp.where(over, count - chunk_size, count)
  out = choose(rest, out, later)
  if marks is None:
    return (carry, count), out

  same = numbers[:, :, None] == numbers[:, None]
  inside = (~entering & live)[:, None] & same & np.tri(size, dtype=bool)
  last, later = learn(fresh, tokens, inside)
  carry, count = select(
    entering[:, -1],
    (carry, count),
    (last, jnp.sum(inside[:, -1], 1, dtype=jnp.int32)),
  )
  return (carry, count), choose(entering, out, later)


def _begin_where(full, begin, carry, *, rare):
  if not rare:
    return select(full, begin(carry), carry)
  return jax.lax.cond(
    jnp.any(full),
    lambda carry: select(full, begin(carry), carry),
    lambda carry: carry,
    carry,
  )


def select(where: Array, x: Any, y: Any) -> Any:
  """Rows [B] of the pytree x where `where`, of y elsewhere."""

  def leaf(x, y):
    return jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, y)

  return jax.tree.map(leaf, x, y)
