"""Running ops whose state is an H x V matrix per value head.

What `linear_attention`, `delta_rule` and `dplr` share: the accumulator's dtype,
gates of every kind, grouped value heads, the empty state and both directions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from efficient_attn.ops import shapes
from efficient_attn.ops.products import product
from efficient_attn.ops.recurrent import (
  chunk_states,
  forms,
  gates,
  triangular,
)


def recur(
  step: Callable,
  chunk: chunk_states.Chunk,
  *,
  keys: Sequence[Array],
  values: Sequence[Array | None],
  log_decay: Array | None,
  initial_state: Array | None,
  segment_ids: Array | None,
  bidirectional: bool,
  form: str | None,
  chunk_size: int,
  implementation: str | None = None,
  execute: Callable | None = None,
  floor: bool = True,
) -> tuple[Array, Array | None]:
  """Runs the recurrence over tokens (keys, values, gate).

  Args:
    step: see `forms.recur`; keys arrive as [B, K, 1, H], values as
      [B, K, G, X] and the gate as [B | 1, K, G, H | 1], the state as
      [B, K, G, H, V].
    chunk: the same with C tokens, [B, K, G, C, X].
    keys: [B, T, K, H], shared by the G = N / K value heads of a group.
    values: [B, T, N, X] or None; the first are the values of the state.
    log_decay: any kind of gate, see `gates.expand_log_decay`.
    initial_state: [B, N, H, V] or None for zeros.
    segment_ids: see `forms.recur`.
    bidirectional: adds the same op on the reversed sequence.
    form: see `forms.recur`.
    chunk_size: see `forms.recur`.
    implementation: see `forms.recur`.
    execute: called instead of `forms.recur`, as it is; `segment_ids` and what
      follows by keyword.
    floor: see `gates.expand_log_decay`.

  Returns:
    out: [B, T, N, V] and
    state: [B, N, H, V] (None when bidirectional), in the accumulator's dtype.
  """
  batch, length, kv_heads, channels = keys[0].shape
  heads, width = values[0].shape[2:]
  shapes.check_directions(bidirectional, initial_state)
  memory = (batch, heads, channels, width)
  shapes.check_shapes(
    {
      'initial_state': (initial_state, memory),
      'segment_ids': (segment_ids, (batch, length)),
    }
  )
  dtype = shapes.accumulator(keys, values, log_decay, initial_state)
  gate = gates.expand_log_decay(
    log_decay, (batch, length, heads, channels), dtype, floor=floor
  )

  def by_group(x):
    return None if x is None else shapes.group(x, kv_heads, axis=2)

  tokens = (
    [k[:, :, :, None] for k in keys],
    [by_group(v) for v in values],
    by_group(gate),
  )
  state = initial_state
  if state is None:
    state = jnp.zeros(memory, dtype)
  state = shapes.group(state.astype(dtype), kv_heads, axis=1)
  if execute is None:
    execute = functools.partial(
      forms.recur,
      implementation=implementation,
      dtype=shapes.operand(dtype, *keys, values[0]),
    )

  def run(tokens, segment_ids):
    return execute(
      step,
      chunk,
      tokens,
      state,
      segment_ids=segment_ids,
      form=form,
      chunk_size=chunk_size,
    )

  out, last = run(tokens, segment_ids)
  if bidirectional:
    backward, _ = run(*forms.reversed_tokens((tokens, segment_ids)))
    out = out + jnp.flip(backward, 1)
  out = out.reshape(batch, length, heads, width)
  return out, None if bidirectional else last.reshape(memory)


def scaled(out: Array, scale: shapes.Scalar | None, q: Array, v: Array):
  """Returns out times scale (None: H ** -0.5 of q), in the dtype of v."""
  return (out * (q.shape[-1] ** -0.5 if scale is None else scale)).astype(
    v.dtype
  )


def contract(spec: str, x: Array, y: Array) -> Array:
  """An einsum of one token, in full precision."""
  return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)


def products(operand: jnp.dtype, dtype: jnp.dtype) -> Callable:
  """An einsum with operands of one dtype and sums of another."""
  return functools.partial(product, operand=operand, dtype=dtype)


class Writes(NamedTuple):
  """What a chunk of rank-one updates writes, [B, K, G, C, X].

  The updates are U = u - W S with the state S before the chunk; or, where
  `lower` is given, they solve (I + lower) U = u - W S.

  Attributes:
    w: what of the state takes part in the updates.
    u: what does not.
    lower: [B, K, G, C, C] or None.
    key: where the updates are written.
    added: a further key and value, or None.
    total: [B, K, G, H|1, 1], the decay of the state over the chunk.
  """

  w: Array
  u: Array
  lower: Array | None
  key: Array
  added: tuple[Array, Array] | None
  total: Array


class Reads(NamedTuple):
  """What a chunk of rank-one updates reads, [B, K, G, C, X].

  Attributes:
    query: of the state before the chunk.
    scores: [B, K, G, C, C], of the updates.
    inside: what it reads of its own tokens besides, or None.
  """

  query: Array
  scores: Array
  inside: Array | None


def updates(
  lower: Array, u: Array, w: Array, *, operand: jnp.dtype, wide: bool
) -> tuple[Array, Array, Array | None]:
  """(w, u, lower) of `Writes`: with all chunks at once the system is solved.

  In sequence the system of one right-hand side is half the work.
  """
  if not wide:
    return w.astype(operand), u, lower
  batch = jnp.broadcast_shapes(u.shape[:-1], w.shape[:-1])
  both = [jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in (w, u)]
  refine = operand != jnp.bfloat16
  solved = triangular.solve_unit_lower(
    lower, jnp.concatenate(both, -1), True, refine
  )
  w, u = jnp.split(solved, [w.shape[-1]], -1)
  return w.astype(operand), u, None


def advance(
  state: Array, writes: Writes, marks: chunk_states.Marks | None
) -> tuple[Array, tuple[Array, Array]]:
  """The state after a chunk of rank-one updates; the state before and they."""
  w, u, lower, key, added, total = writes
  operand = key.dtype
  dot = products(operand, state.dtype)
  update = u - dot('...ih,...hv->...iv', w, state)
  if lower is not None:
    update = triangular.solve_unit_lower(lower, update)
  seen = state.astype(operand), update.astype(operand)
  state = carried(total * state, marks)
  state = state + dot('...jh,...jv->...hv', key, update)
  if added is not None:
    state = state + dot('...jh,...jv->...hv', *added)
  return state, seen


def read(
  seen: tuple[Array, Array],
  reads: Reads,
  marks: chunk_states.Marks | None,
  *,
  wide: bool,
) -> Array:
  """The outputs of a chunk of rank-one updates."""
  del wide
  state, update = seen
  dot = products(state.dtype, shapes.accumulator(state, reads.query))
  past = dot('...ih,...hv->...iv', reads.query, state)
  out = dot('...ij,...jv->...iv', reads.scores, update)
  out = out + kept(past, marks, 'reads')
  return out if reads.inside is None else out + reads.inside


def causal(scores: Array, marks: chunk_states.Marks | None, *, diagonal: bool):
  """Keeps scores [B, K, G, C, C] of the past of the same segment."""
  mask = jnp.tri(scores.shape[-1], k=0 if diagonal else -1, dtype=bool)
  if marks is not None:
    mask &= marks.same[:, None, None]
  return jnp.where(mask, scores, 0)


def kept(x: Array, marks: chunk_states.Marks | None, which: str) -> Array:
  """Keeps rows of `x` [B, K, G, C, X] by marks.reads or marks.writes."""
  if marks is None:
    return x
  return jnp.where(getattr(marks, which)[:, None, None, :, None], x, 0)


def carried(state: Array, marks: chunk_states.Marks | None) -> Array:
  """Keeps states [B, K, G, H, V] where no segment begins in the chunk."""
  if marks is None:
    return state
  return jnp.where(marks.keeps[:, None, None, None, None], state, 0)
