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
  """The place of a cache in its rows.

  Attributes:
    length: [] int32, how many tokens it has seen, with what was padding.
    start: [B] int32, how many of them were padding in front of each row, or in
      earlier segments; None for none. So rows of unequal length end together.
  """

  length: jax.Array
  start: jax.Array | None = None

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

  The context has them, or they count from the first token of the segment of
  each, which may be in what a cache has seen.
  """
  if context.positions is not None:
    return context.positions
  if cursor is None:
    return jnp.arange(count)
  starts = cursor.starts(context, count)
  new = cursor.length + jnp.arange(count)
  return new if starts is None else new - starts


def _tokens(arrays: Mapping[str, jax.Array]) -> int:
  return next(iter(arrays.values())).shape[1]


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
    at, count, room = self.cursor.length, _tokens(new), _tokens(self.buffers)
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


@chex.dataclass(frozen=True)
class WindowCache:
  """Something of the last M tokens.

  Attributes:
    buffers: arrays [B, M, ...] by name; the last token is at their end.
    cursor: how many tokens there were, of which the first may be gone.
  """

  buffers: dict[str, jax.Array]
  cursor: Cursor

  @property
  def size(self) -> int:
    """How many tokens it keeps."""
    return _tokens(self.buffers)

  def append(self, context: Context, **new: jax.Array):
    """Returns what was kept with the new tokens behind it, and the next cache.

    Joined arrays are [B, M + T, ...].
    """
    count = _tokens(new)
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
    at = self.cursor.length - self.size + jnp.arange(self.size)
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


_CACHES = (TokenCache, WindowCache, RecurrentCache, Cursor)


def _is_cache(x) -> bool:
  return isinstance(x, _CACHES)


def can_rewind(cache: Any, read: int) -> bool:
  """Tells whether `rewind` works on caches that have read `read` more tokens.

  Not where a state summarises tokens: it does not say what it was before.
  """

  def can(cache):
    if isinstance(cache, TokenCache):
      return cache.state is None
    if isinstance(cache, WindowCache):
      axis = cache.cursor.length.ndim + 1
      return read <= next(iter(cache.buffers.values())).shape[axis]
    if isinstance(cache, RecurrentCache):
      return not jax.tree.leaves((cache.state, cache.tails))
    return isinstance(cache, Cursor)

  return all(map(can, jax.tree.leaves(cache, is_leaf=_is_cache)))


def rewind(before: Any, after: Any, read: int, count: jax.Array) -> Any:
  """Takes back all but the first tokens that were read.

  Args:
    before: any pytree of caches, layers and rows stacked or not.
    after: the same after `read` tokens of no other segment.
    read: how many tokens that were.
    count: [] int32, how many of them stay.

  Returns:
    The caches after the first `count` of the tokens.
  """

  def back(before, after):
    if isinstance(before, Cursor):
      return before.replace(length=before.length + count)
    cursor = before.cursor and back(before.cursor, None)
    if isinstance(before, RecurrentCache):
      return before.replace(cursor=cursor)
    axis = before.cursor.length.ndim + 1  # of tokens, behind layers and rows

    def of_window(old, new):
      size = old.shape[axis]
      new = jax.lax.slice_in_dim(new, size - read, size, axis=axis)
      joined = jnp.concatenate([old, new], axis)
      return jax.lax.dynamic_slice_in_dim(joined, count, size, axis)

    def of_tokens(old, new):
      at = jax.lax.broadcasted_iota(jnp.int32, old.shape, axis)
      length = jnp.expand_dims(cursor.length, range(axis - 1, old.ndim))
      return jnp.where(at < length, new, old)

    window = isinstance(before, WindowCache)
    buffers = jax.tree.map(
      of_window if window else of_tokens, before.buffers, after.buffers
    )
    return before.replace(buffers=buffers, cursor=cursor)

  return jax.tree.map(back, before, after, is_leaf=_is_cache)


def recall(
  context: Context, cache: TokenCache | WindowCache | None, **new: jax.Array
):
  """Returns a tuple of arrays of all that is kept, the next cache, an offset.

  The offset is the place in them of the first of the `new` tokens [B, T, ...],
  which are all that there are without a cache; an int for a window.
  """
  if cache is None:
    return tuple(new.values()), None, 0
  if isinstance(cache, WindowCache):
    offset = cache.size
    found, cache = cache.append(context, **new)
  else:
    offset, cache = cache.cursor.length, cache.append(context, **new)
    found = cache.buffers
  return tuple(found[name] for name in new), cache, offset


def restrict(
  mask: masks.Mask | None,
  context: Context,
  cursor: Cursor | None,
  count: int,
  offset: int | jax.Array,
  keys: int,
) -> masks.Mask | None:
  """Restricts the mask of `count` new tokens to the segment of each.

  Args:
    mask: None for all; without a later key where there is a cache.
    context: of the new tokens.
    cursor: of the cache before them; None for none.
    count: of new tokens.
    offset: the place of the first of them among the keys. An int, that of a
      window, may leave room for tokens before the first one.
    keys: how many there are.

  Returns:
    The mask, without padding in front too; None for all.
  """
  if cursor is None:
    ids = context.segment_ids
    return mask if ids is None else masks.packed(mask, ids)
  starts = cursor.starts(context, count)
  if starts is None and not isinstance(offset, int):
    return mask
  if starts is None:
    starts = jnp.zeros((1, count), jnp.int32)
  index = cursor.length - offset + jnp.arange(keys)
  begun = masks.At(~masks.Causal(-1), starts, index[None])
  return begun if mask is None else mask & begun
