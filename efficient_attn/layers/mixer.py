"""The contract of a token mixer, and its optional abilities.

  mixer(x, context=None, cache=None) -> (y, cache)
  mixer.init_cache(batch, max_len, dtype) -> cache

x and y are [B, T, D]; `context` says where the tokens stand, see `Context`.
Without a cache the call sees whole sequences; with one the same call continues
where the cache ends, by one token or by many. Prompts of unequal length begin
with padding, ids of 0, and tokens after them need no ids. What padding holds,
NaN and infinities too, reaches no other token. A NaN in another segment or in
the future stays there only where it is in another chunk or tile.
"""

from typing import Protocol, runtime_checkable

import jax
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.context import Context


class Mixer(nnx.Module):
  """Token mixer [B, T, D] -> [B, T, D]; a subclass has the other methods.

  Attributes:
    causal: whether no token sees a later one, without which there is no cache.
    packing: whether it keeps the segments of a packed row apart.
    left_padding: whether a cache may begin with padding, as rows of unequal
      length have it.
  """

  causal = True
  packing = True
  left_padding = True

  def __call__(self, x: jax.Array, context: Context | None = None, cache=None):
    """Returns y [B, T, D] and the next cache (None without one)."""
    context = Context() if context is None else context
    return self.mix_tokens(self.ready(x, context, cache), context, cache)

  def ready(self, x: jax.Array, context: Context, cache) -> jax.Array:
    """Returns x with finite padding, where it can mix such rows."""
    self.check_rows(context, cache)
    return context.without_padding(x, entirely=cache is not None)

  def check_rows(self, context: Context, cache) -> None:
    """Raises where it cannot mix such rows."""
    name, segments = type(self).__name__, context.segment_ids is not None
    if cache is not None and not self.causal:
      refuse_cache(name)
    if cache is not None and segments and not self.left_padding:
      raise NotImplementedError(
        f'{name} cannot begin a cache with padding or continue packed'
        ' sequences, because it counts tokens from the start of the row; make'
        ' prompts of one length, or decode them one by one'
      )
    if segments and not self.packing:
      refuse_segments(name, context)

  def mix_tokens(self, x: jax.Array, context: Context, cache):
    """Mixes x [B, T, D], whose padding is finite."""
    raise NotImplementedError

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the cache before the first of at most `max_len` tokens."""
    raise NotImplementedError


class WholeMixer(Mixer):
  """A mixer of whole, unpacked sequences, where every token sees every other.

  A subclass has `mix_whole`.
  """

  causal = packing = left_padding = False

  def mix_tokens(self, x, context, cache):
    """Mixes whole rows, without a cache."""
    return self.mix_whole(x, context), None

  def mix_whole(self, x: jax.Array, context: Context) -> jax.Array:
    """Maps x [B, T, D] to the same shape."""
    raise NotImplementedError

  def init_cache(self, batch: int, max_len: int, dtype):
    """Refuses: there is no next token."""
    refuse_cache(type(self).__name__)


def refuse_cache(name: str) -> None:
  """Raises where a mixer of encoders is asked to continue."""
  raise NotImplementedError(
    f'{name} has no cache: every token sees every other, so there is no next'
    ' one; for a decoder use a causal mixer'
  )


def refuse_segments(name: str, context: Context) -> None:
  """Raises where a mixer would mix packed sequences."""
  if context.segment_ids is not None:
    raise NotImplementedError(
      f'{name} cannot keep packed sequences apart; use one sequence a row'
      " (data.packing='concat'), or a mixer whose row says packing"
    )


def check_has_grid(name: str, grid: tuple[int, ...]) -> None:
  """Raises where a mixer of the places of a grid gets none."""
  if not grid:
    raise ConfigError(
      f'{name} needs a grid of tokens: a sequence has none, nor have images'
      " with a class token (set model.pooling='mean')"
    )


@runtime_checkable
class OnGrid(Protocol):
  """A mixer of the places of a grid, `Context.grid`."""

  def check_grid(self, grid: tuple[int, ...]) -> None:
    """Raises a ConfigError for () and for a grid that it cannot mix."""


@runtime_checkable
class Penalized(Protocol):
  """A mixer with an objective of its own beside that of the model."""

  def penalty(self) -> jax.Array:
    """Returns a scalar that training adds to the mean loss.

    The parameters of a scanned stack have a leading axis of layers there, so
    it is a sum over all of them.
    """


@runtime_checkable
class SharesKeys(Protocol):
  """A mixer whose keys and values another layer can read.

  Attributes:
    shared_kv: whether it has none of its own and reads those of the nearest
      such layer before it in the pattern.
    shares_keys: whether its options leave all its keys for another to read.
    kv_heads: their number and width.
  """

  shared_kv: bool
  shares_keys: bool
  kv_heads: tuple[int, int]

  def mix_sharing(self, x, context, cache, shared):
    """Returns y, the cache, and what the next layer finds in `shared`."""
