"""The chunkwise form as a forward and a backward pass over saved states.

A chunk of C tokens is three functions, of which only the second is in
sequence:

  prepare(tokens, marks) -> (writes, reads)       what needs no state
  advance(state, writes, marks) -> (state, seen)  from one chunk to the next
  read(seen, reads, marks) -> out                 what reads the state

`Cut` says how many chunks run at once. A CPU takes one after the other. An
accelerator prepares and reads, in single products, as many chunks as fill it
and stay on the chip, one where batch and heads are many; in sequence is then
only the state of every chunk.

The two passes stand apart, so that a kernel can take the place of each:
`forward` returns the states before every span of tokens, `backward` takes
them. A span is one or more chunks, or a part of one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from efficient_attn.ops import chunks

# What the chunks that run at once may hold between their three functions. The
# products of a chunk are several times as large, and stay on the chip: a TPU
# v5e has 128 MiB there, and inverts triangles 3 times faster in it.
GROUP_BYTES = 2**24


class Marks(NamedTuple):
  """The segments of a chunk, as masks.

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


class Chunk(NamedTuple):
  """One chunk of a recurrence; arrays in all its pytrees are floating.

  Attributes:
    prepare: maps (tokens, marks, wide=) to (writes, reads). Tokens come as
      [B, ..., C, X]: the token axis stands second to last; marks are None
      without segments. `wide`: many chunks run at once, on matrix units.
    advance: maps (state, writes, marks) to the state after the chunk and what
      reads see of the state before it.
    read: maps (seen, reads, marks, wide=) to the outputs, as tokens come.
  """

  prepare: Callable[..., tuple[Any, Any]]
  advance: Callable[..., tuple[Any, Any]]
  read: Callable[..., Any]


class Cut(NamedTuple):
  """How a sequence is cut into chunks.

  Attributes:
    size: tokens per chunk, a power of two.
    wide: whether as many chunks run at once as stay on the chip, in products
      that suit a matrix unit.
  """

  size: int
  wide: bool


def run(
  chunk: Chunk,
  cut: Cut,
  tokens: Any,
  state: Any,
  segment_ids: Int[Array, 'B T'] | None,
) -> tuple[Any, Any]:
  """The outputs and the last state, as plain JAX to be differentiated."""
  length = jax.tree.leaves(tokens)[0].shape[1]
  if cut.wide:
    return forward(
      chunk, cut, tokens, state, segment_ids, span=cut.size, dtype=None
    )[:2]
  split, marks, _ = _layout(tokens, segment_ids, cut.size, 1)
  body = functools.partial(_one, chunk)
  inputs = split(tokens), marks
  if -(-length // cut.size) == 1:
    state, out = body(state, jax.tree.map(lambda x: x[0], inputs))
    out = jax.tree.map(lambda x: x[None], out)
  else:
    state, out = jax.lax.scan(jax.checkpoint(body), state, inputs)
  return jax.tree.map(lambda x: _join(x, length), out), state


def forward(
  chunk: Chunk,
  cut: Cut,
  tokens: Any,
  state: Any,
  segment_ids: Int[Array, 'B T'] | None,
  *,
  span: int,
  dtype: jnp.dtype | None,
) -> tuple[Any, Any, Any]:
  """Runs the chunkwise form and keeps the state before every span.

  Args:
    chunk: of the recurrence.
    cut: how the sequence is cut.
    tokens: pytree of [B, T, ..., X] (or [1, T, ..., X]). Tokens of zeros,
      which fill up the last chunk, must leave the state as it is.
    state: pytree of [B, ...], before token 0.
    segment_ids: the state is reset where an id differs from the one before.
    span: tokens between two states, a power of two.
    dtype: of the states that are kept, None for their own.

  Returns:
    out: of the tokens, pytree of [B, T, ..., X].
    state: after the last token.
    states: pytree of [ceil(T / span), B, ...].
  """
  length = jax.tree.leaves(tokens)[0].shape[1]

  def save(state):
    return jax.tree.map(lambda s: s.astype(dtype or s.dtype), state)

  if cut.wide:
    group = _group(chunk, cut.size, tokens, state)
    split, marks, _ = _layout(tokens, segment_ids, cut.size, group)

    def body(before, inputs):
      return _group_forward(chunk, save, before, inputs)

    last, (out, states) = _over_groups(
      body, group, state, (split(tokens), marks)
    )
  else:
    split, marks, _ = _layout(
      tokens, segment_ids, cut.size, max(span // cut.size, 1)
    )

    def body(before, inputs):
      after, out = _one(chunk, before, inputs)
      return after, (out, save(before))

    last, (out, states) = jax.lax.scan(body, state, (split(tokens), marks))
  out = jax.tree.map(lambda x: _join(x, length), out)
  count = -(-length // span)
  if span >= cut.size:
    states = jax.tree.map(lambda s: s[:: span // cut.size][:count], states)
  else:  # filled up, because all ways to cut keep equally many

    def fill(s):
      zeros = jnp.zeros((max(count - s.shape[0], 0), *s.shape[1:]), s.dtype)
      return jnp.concatenate([s, zeros])[:count]

    states = jax.tree.map(fill, states)
  return out, last, states


def backward(
  chunk: Chunk,
  cut: Cut,
  tokens: Any,
  segment_ids: Int[Array, 'B T'] | None,
  states: Any,
  out: Any,
  last: Any,
  *,
  span: int,
) -> tuple[Any, Any]:
  """Takes the cotangents of `out` and `last` back to tokens and first state.

  Args:
    chunk: as in `forward`.
    cut: how the sequence is cut.
    tokens: those of `forward`.
    segment_ids: those of `forward`.
    states: what `forward` kept.
    out: the cotangent of the outputs.
    last: the cotangent of the last state.
    span: as in `forward`.

  Returns:
    The cotangents of the tokens and of the state before token 0.
  """
  inner = max(span // cut.size, 1)
  group = inner
  if cut.wide:  # where spans are not longer than chunks
    group = _group(chunk, cut.size, tokens, last)
  split, marks, count = _layout(tokens, segment_ids, cut.size, group)
  inputs, join = jax.vjp(split, tokens)

  def fill(s):  # states before tokens that only fill up
    s = s[: count // inner]
    missing = count // inner - s.shape[0]
    return jnp.pad(s, [(0, missing)] + [(0, 0)] * (s.ndim - 1))

  states = jax.tree.map(fill, states)
  if not cut.wide:
    states = jax.tree.map(lambda s, x: s.astype(x.dtype), states, last)
  if inner > 1:
    states = _within_spans(chunk, states, (inputs, marks), inner)
  inputs = inputs, marks, states, split(out)
  if cut.wide:
    body = functools.partial(_group_backward, chunk)
    first, found = _over_groups(body, group, last, inputs, reverse=True)
  else:

    def body(after, inputs):
      tokens, marks, state, out = inputs
      _, pull = jax.vjp(
        lambda *args: _one(chunk, args[0], (args[1], marks)), state, tokens
      )
      return pull((after, out))

    first, found = jax.lax.scan(body, last, inputs, reverse=True)
  return join(found)[0], first


def _one(chunk, state, inputs):
  """One chunk after the other: (tokens, counts) of one."""
  tokens, counts = inputs
  marks = None if counts is None else _marks(*counts)
  writes, reads = chunk.prepare(tokens, marks, wide=False)
  after, seen = _advance(chunk, state, writes, marks)
  return after, chunk.read(seen, reads, marks, wide=False)


def _advance(chunk, state, writes, marks):
  if marks is not None:
    # A state that the first token does not read is of a segment that is over.
    # As zeros it reaches no product, whatever it holds.
    state = jax.tree.map(lambda s: where_rows(marks.reads[:, 0], s), state)
  return chunk.advance(state, writes, marks)


def _group_forward(chunk, save, before, inputs):
  """The chunks of a group at once: (tokens, counts) of [group, ...]."""
  tokens, counts = inputs
  marks = None if counts is None else jax.vmap(_marks)(*counts)
  prepare = functools.partial(chunk.prepare, wide=True)
  writes, reads = jax.vmap(prepare)(tokens, marks)

  def step(state, inputs):
    return _advance(chunk, state, *inputs)[0], save(state)

  after, states = jax.lax.scan(step, before, (writes, marks))
  seen = _seen(chunk, states, before, writes, marks)
  read = functools.partial(chunk.read, wide=True)
  return after, (jax.vmap(read)(seen, reads, marks), states)


def _seen(chunk, states, like, writes, marks):
  """What reads see of the states before all chunks of a group."""
  states = jax.tree.map(lambda s, x: s.astype(x.dtype), states, like)
  return jax.vmap(functools.partial(_advance, chunk))(states, writes, marks)[1]


def _group_backward(chunk, after, inputs):
  """The backward pass of `_group_forward`, from the states before chunks."""
  tokens, counts, states, out = inputs
  marks = None if counts is None else jax.vmap(_marks)(*counts)

  def prepare(tokens):
    return jax.vmap(functools.partial(chunk.prepare, wide=True))(tokens, marks)

  def read(seen, reads):
    return jax.vmap(functools.partial(chunk.read, wide=True))(
      seen, reads, marks
    )

  (writes, reads), pull_tokens = jax.vjp(prepare, tokens)
  seen = _seen(chunk, states, after, writes, marks)
  _, pull_reads = jax.vjp(read, seen, reads)
  seen, reads = pull_reads(out)

  def step(after, inputs):
    state, writes, marks, seen = inputs
    state = jax.tree.map(lambda s, x: s.astype(x.dtype), state, after)
    _, pull = jax.vjp(
      lambda *args: _advance(chunk, *args, marks), state, writes
    )
    return pull((after, seen))

  first, writes = jax.lax.scan(
    step, after, (states, writes, marks, seen), reverse=True
  )
  return first, pull_tokens((writes, reads))[0]


def _over_groups(body, group, carry, inputs, *, reverse=False):
  """Scans over groups of [chunks, ...]; one group needs no loop."""
  count = jax.tree.leaves(inputs)[0].shape[0] // group
  if count == 1:
    return body(carry, inputs)
  inputs = jax.tree.map(lambda x: x.reshape(count, group, *x.shape[1:]), inputs)
  carry, found = jax.lax.scan(body, carry, inputs, reverse=reverse)
  return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _group(chunk, size, tokens, state):
  """How many chunks run at once, by what they hold."""
  length = jax.tree.leaves(tokens)[0].shape[1]
  count = -(-length // size)

  def one(tokens, state):
    writes, reads = chunk.prepare(tokens, None, wide=True)
    return writes, reads, chunk.advance(state, writes, None)[1]

  def leaf(x):
    batch, _, *middle, width = x.shape
    return jax.ShapeDtypeStruct((batch, *middle, size, width), x.dtype)

  found = jax.eval_shape(one, jax.tree.map(leaf, tokens), state)
  held = sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(found)
  )
  groups = min(count, -(-count * held // GROUP_BYTES))
  return -(-count // groups)


def _within_spans(chunk, states, inputs, inner):
  """The states before all chunks from those before every span."""

  def by_place(x):  # all chunks of a span but its last
    return jnp.swapaxes(x.reshape(-1, inner, *x.shape[1:]), 0, 1)[:-1]

  inputs = jax.tree.map(by_place, inputs)
  run = jax.vmap(functools.partial(_one, chunk))

  def body(states, inputs):
    after, _ = run(states, inputs)
    return after, after

  _, within = jax.lax.scan(body, states, inputs)

  def merge(first, rest):
    states = jnp.concatenate([first[None], rest])
    return jnp.swapaxes(states, 0, 1).reshape(-1, *states.shape[2:])

  return jax.tree.map(merge, states, within)


def _layout(tokens, segment_ids, size, multiple):
  """A function to [chunks, B, ..., C, X]; counts of segments; chunks.

  The number of chunks is a multiple of `multiple`.
  """
  length = jax.tree.leaves(tokens)[0].shape[1]

  def cut(x, pad='constant'):
    missing = -x.shape[1] % (size * multiple)
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return chunks.to_chunks(jnp.pad(x, widths, mode=pad), size)

  def split(tree):
    return jax.tree.map(lambda x: jnp.moveaxis(cut(x), 2, -2), tree)

  counts = None
  if segment_ids is not None:
    found = cut(chunks.segment_counts(segment_ids), 'edge')
    counts = found, chunks.counts_before(found)
  return split, counts, multiple * -(-length // (size * multiple))


def _join(x: Array, length: int) -> Array:
  """[chunks, B, ..., C, X] to [B, T, ..., X]."""
  x = jnp.moveaxis(x, (0, -2), (1, 2))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def where_rows(rows: Bool[Array, 'B'], state: Array) -> Array:
  """Keeps the rows of a state [B, ...]; the others are zero."""
  return jnp.where(rows.reshape(-1, *[1] * (state.ndim - 1)), state, 0)


def _marks(counts, previous):
  return Marks(
    same=counts[:, :, None] == counts[:, None, :],
    reads=counts == previous[:, None],
    writes=counts == counts[:, -1:],
    keeps=previous == counts[:, -1],
  )
