"""Caches: what is kept of the tokens that came before.

A cache is a frozen dataclass, and every call returns the next one. Each array
has a buffer of its own, so that a step can donate the cache. All arrays but the
scalars have the rows of the batch as their first axis.

  TokenCache      something of every token: keys and values, latents, bits
  WindowCache     something of the last tokens
  RecurrentCache  a state of fixed size
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.layers.context import Context
from efficient_attn.ops import chunks, masks


@chex.dataclass(frozen=True)
class Cursor:
  """How far a cache has come.

  Attributes:
    length: [] int32, how many tokens it has seen, with what was padding.
    start: [B] int32, how many of them were padding in front of each row, or in
      earlier segments; None for none. So rows of unequal length end together.
  """

  length: jax.Array
  start: jax.Array | None = None

  def positions(self, *span: int) -> jax.Array:
    """Returns those of the tokens of range(*span) from here on.

    They are [T], or [B, T] with padding, where those are negative.
    """
    new = self.length + jnp.arange(*span)
    return new if self.start is None else new - self.start[:, None]

  def starts(self, context: Context, count: int) -> jax.Array | None:
    """Returns the first token that each of `count` new ones may see, [B, T].

    That is where its segment began; None: token 0.
    """
    ids, start = context.segment_ids, self.start
    if ids is None:
      if start is None:
        return None
      return jnp.broadcast_to(start[:, None], (start.size, count))
    start = jnp.zeros_like(ids[:, 0]) if start is None else start
    return chunks.first_tokens(ids, self.length, start)

  def advance(self, count: int, context: Context) -> 'Cursor':
    """Moves on by `count` tokens, of which those of id 0 are padding.

    What comes behind padding begins anew.
    """
    length, start = self.length + count, self.start
    if context.segment_ids is not None:
      start = jnp.where(
        context.segment_ids[:, -1] == 0,
        length,
        self.starts(context, count)[:, -1],
      )
    return Cursor(length=length, start=start)


def new_cursor() -> Cursor:
  """Returns the cursor before the first token."""
  return Cursor(length=jnp.zeros((), jnp.int32))


def positions_of(context: Context, cursor: Cursor | None, count: int):
  """Returns the positions of `count` new tokens, [T] or [B, T].

  The context has them, or they count on from what a cache has seen, else from
  0. Padding that begins here counts down to -1.
  """
  if context.positions is not None:
    return context.positions
  if cursor is None:
    return jnp.arange(count)
  starts = cursor.starts(context, count)
  new = cursor.length + jnp.arange(count)
  return new if starts is None else new - starts


@chex.dataclass(frozen=True)
class TokenCache:
  """Room for something of every token.

  Attributes:
    buffers: arrays [B, M, ...] by name.
    cursor: where the next token goes; writing past M is wrong.
    state: what else is kept, replaced as a whole.
  """

  buffers: dict[str, jax.Array]
  cursor: Cursor
  state: Any = None

  def append(self, context: Context, **new: jax.Array) -> 'TokenCache':
    """Writes the new tokens [B, T, ...] behind those before."""
    at, count = self.cursor.length, next(iter(new.values())).shape[1]
    room = next(iter(self.buffers.values())).shape[1]
    if count > room:
      raise ValueError(f'{count} tokens but a cache of {room}; make it larger')
    buffers = {
      name: jax.lax.dynamic_update_slice_in_dim(
        sharding.like(buffer, new[name]),
        new[name].astype(buffer.dtype),
        at,
        axis=1,
      )
      for name, buffer in self.buffers.items()
    }
    cursor = self.cursor.advance(count, context)
    return self.replace(buffers=buffers, cursor=cursor)


def token_cache(
  batch: int,
  max_len: int,
  dtype,
  state: Any = None,
  dtypes: Mapping[str, Any] = {},
  **widths: tuple[int, ...],
) -> TokenCache:
  """Returns room for `max_len` tokens, of `widths` by name.

  Buffers have `dtype`, except those named in `dtypes`.
  """
  buffers = {
    name: jnp.zeros((batch, max_len, *width), dtypes.get(name, dtype))
    for name, width in widths.items()
  }
  return TokenCache(buffers=buffers, cursor=new_cursor(), state=state)


def recall(context: Context, cache: TokenCache | None, **new: jax.Array):
  """Returns a tuple of arrays of all tokens, the next cache, and an offset.

  The offset is the index of the first of the `new` tokens [B, T, ...], which
  are all that there are without a cache.
  """
  if cache is None:
    return tuple(new.values()), None, 0
  offset, cache = cache.cursor.length, cache.append(context, **new)
  return tuple(cache.buffers[name] for name in new), cache, offset


def restrict(
  mask: masks.Mask | None, context: Context, cache: TokenCache | None, count
) -> masks.Mask | None:
  """Restricts the mask of `count` new tokens to the segment of each.

  `cache` is the one before them, whose padding in front is hidden too. `mask`
  is causal where there is one, and counts tokens from the first that it holds.
  """
  if cache is None:
    ids = context.segment_ids
    return mask if ids is None else masks.packed(mask, ids)
  starts = cache.cursor.starts(context, count)
  if starts is None:
    return mask
  room = next(iter(cache.buffers.values())).shape[1]
  begun = masks.At(~masks.Causal(-1), starts, jnp.arange(room)[None])
  return mask & begun


@chex.dataclass(frozen=True)
class WindowCache:
  """Something of the last M tokens.

  Attributes:
    buffers: arrays [B, M, ...] by name; the last token is at their end.
    cursor: how many tokens there were, of which the first may be gone.
  """

  buffers: dict[str, jax.Array]
  cursor: Cursor

  def append(self, context: Context, **new: jax.Array):
    """Returns what was kept with the new tokens behind it, and the next cache.

    Joined arrays are [B, M + T, ...]. `real` tells which of them are tokens.
    """
    count = next(iter(new.values())).shape[1]
    joined = {
      name: jnp.concatenate(
        [sharding.like(buffer, new[name]), new[name].astype(buffer.dtype)],
        axis=1,
      )
      for name, buffer in self.buffers.items()
    }
    buffers = {name: array[:, count:] for name, array in joined.items()}
    cursor = self.cursor.advance(count, context)
    return joined, WindowCache(buffers=buffers, cursor=cursor)

  def real(self) -> jax.Array:
    """Tells which of the kept are tokens of their row, bool [#B, M]."""
    kept = next(iter(self.buffers.values())).shape[1]
    at = self.cursor.length - kept + jnp.arange(kept)
    start = self.cursor.start
    return at[None] >= (0 if start is None else start[:, None])


def window_cache(
  batch: int, size: int, dtype, **widths: tuple[int, ...]
) -> WindowCache:
  """Returns the cache before the first token that keeps `size` tokens."""
  empty = token_cache(batch, size, dtype, **widths)
  return WindowCache(buffers=empty.buffers, cursor=empty.cursor)


@chex.dataclass(frozen=True)
class RecurrentCache:
  """A state of fixed size.

  Attributes:
    state: of the recurrence, arrays [B, ...].
    tails: the last inputs of convolutions and shifts, arrays [B, ...].
    cursor: where the mixer counts tokens, else None.
  """

  state: Any
  tails: Any = None
  cursor: Cursor | None = None


def nbytes(cache: Any) -> int:
  """Returns the bytes of a cache, or of its shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
