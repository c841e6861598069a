"""What the mixers with a recurrent state share.

Recurrence   an op and the layouts of its arrays
Recurrent    the mixer around it and its cache
GatedOutput, NormedOutput   what maps heads to the output
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.cache import RecurrentCache, new_cursor
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import LowRank, Projection
from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.ops.recurrent.diagonal_scan import diagonal_scan
from efficient_attn.ops.recurrent.dplr import dplr
from efficient_attn.ops.recurrent.linear_attention import linear_attention


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrence:
  """An op whose heads are independent, to be run on shards of them.

  Attributes:
    op: called as op(**arrays, segment_ids=, initial_state=, **options), which
      returns [B, T, N, V] and the state.
    inputs: the layout of each array by name, see `sharding.local_op`.
    state: of the state: letters, a tuple of them, or a function from a leaf.
  """

  op: Callable
  inputs: Mapping[str, Any]
  state: Any

  def taking(self, **inputs: str) -> 'Recurrence':
    """Returns the same with more arrays, or others."""
    return dataclasses.replace(self, inputs={**self.inputs, **inputs})

  def __call__(self, arrays, *, segment_ids, state, **options):
    """Returns the output and the state; an array may be None."""
    arrays = {k: v for k, v in arrays.items() if v is not None}

    def call(arrays, segment_ids, state):
      return self.op(
        **arrays, segment_ids=segment_ids, initial_state=state, **options
      )

    def outputs(out, state):
      return 'BTNV', self._of_state(state)

    inputs = (self.inputs, 'BT', self._of_state(state))
    return sharding.local_op(call, inputs, outputs)(arrays, segment_ids, state)

  def _of_state(self, state):
    if callable(self.state):
      return jax.tree.map(self.state, state)
    return None if state is None else self.state

  def zeros(self, batch: int, sizes: Mapping[str, int]):
    """Returns a state of zeros; `sizes` are those of the letters but B."""
    sizes = {'B': batch, **sizes}
    return jax.tree.map(
      lambda letters: jnp.zeros([sizes[letter] for letter in letters]),
      self.state,
    )


# The ops that several mixers use; the others stand with their mixer. Each adds
# the gate it has.
LINEAR = Recurrence(
  linear_attention, {'q': 'BTNH', 'k': 'BTNH', 'v': 'BTNV'}, state='BNHV'
)
DELTA = Recurrence(delta_rule, {**LINEAR.inputs, 'beta': 'BTN'}, state='BNHV')
DPLR = Recurrence(
  dplr, {**LINEAR.inputs, 'a': 'BTNH', 'b': 'BTNH'}, state='BNHV'
)
DIAGONAL = Recurrence(diagonal_scan, {'x': 'BTNH'}, state='BNH')


@functools.cache  # equal mixers have the same one
def with_key_heads(recurrence: Recurrence, key_heads: int) -> Recurrence:
  """Returns the same for q and k with fewer heads; one is on every device."""
  letters = 'BTGH' if key_heads == 1 else 'BTNH'
  return recurrence.taking(q=letters, k=letters)


class Recurrent(Mixer):
  """Token mixer [B, T, D] -> [B, T, D] whose past is a state of fixed size.

  A subclass has `recur`, which calls `scan`.

  Attributes:
    recurrence: what `scan` runs.
    options: of its op.
    sizes: of its state by letter.
    counts: whether `recur` needs to know how many tokens came before.
  """

  recurrence: Recurrence
  counts = False

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    past = RecurrentCache(state=None) if cache is None else cache
    y, *after = self.recur(x, context, past)
    if cache is None:
      return y, None
    if context.segment_ids is not None:
      # Padding is no past: rows that have nothing else stay as they were.
      idle = jnp.all(context.segment_ids == 0, axis=1)
      before = [cache.state, cache.tails]
      after = jax.tree.map(lambda *xs: _choose(idle, *xs), before, after)
    state, tails = after
    cursor = cache.cursor and cache.cursor.advance(x.shape[1], context)
    return y, RecurrentCache(state=state, tails=tails, cursor=cursor)

  def recur(self, x: jax.Array, context, past: RecurrentCache):
    """Returns y, the state and the tails after x.

    Without a cache `past` has None for all of them.
    """
    raise NotImplementedError

  def scan(self, context, past: RecurrentCache, **arrays: jax.Array | None):
    """Returns the output heads [B, T, N, V] and the state."""
    return self.recurrence(
      arrays,
      segment_ids=context.segment_ids,
      state=past.state,
      **self.options,
    )

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the cache before the first token."""
    return RecurrentCache(
      state=self.init_state(batch, max_len, dtype),
      tails=self.init_tails(batch, dtype),
      cursor=new_cursor() if self.counts else None,
    )

  def init_state(self, batch: int, max_len: int, dtype):
    """Returns the state before the first token, zeros by default."""
    return self.recurrence.zeros(batch, self.sizes)

  def init_tails(self, batch: int, dtype):
    """Returns the inputs of convolutions and shifts before the first token."""
    return None


class Convolved(Recurrent):
  """A recurrence behind one short convolution, `self.conv`."""

  def convolve(self, x: jax.Array, context, past: RecurrentCache):
    """Returns the convolved x and its tails."""
    return self.conv(x, segment_ids=context.segment_ids, state=past.tails)

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    return self.conv.init_state(batch, dtype)


def _choose(rows, before, after):
  """Takes the rows [B] of leaves [B, ...] from before; scalars are the same."""
  if not after.ndim:
    return after
  rows = jnp.expand_dims(rows, tuple(range(1, after.ndim)))
  return jnp.where(rows, sharding.like(before, after), after)


class GatedOutput(nnx.Module):
  """y = W_out (norm_per_head(o) * activation(W_gate x)).

  The output of RetNet, GLA and Gated DeltaNet (silu), of Comba (sigmoid) and of
  Kimi Delta Attention (sigmoid, with a gate of low rank).
  """

  def __init__(
    self,
    d_model: int,
    num_heads: int,
    value_dim: int,
    *,
    rngs: nnx.Rngs,
    activation: Callable = jax.nn.silu,
    rank: int = 0,
    gate_bias: bool = False,
    eps: float = 1e-6,
  ):
    heads = {'heads': num_heads, 'head_dim': value_dim}
    self.norm = RMSNorm(value_dim, eps=eps)
    if rank:
      self.gate = LowRank(d_model, rank, heads, bias=gate_bias, rngs=rngs)
    else:
      embed = {'embed': d_model}
      self.gate = Projection(embed, heads, bias=gate_bias, rngs=rngs)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)
    self.activation = activation

  def __call__(self, o: jax.Array, x: jax.Array) -> jax.Array:
    """Maps heads o [B, T, N, V] and the mixer's input x to [B, T, D]."""
    return self.out(self.norm(o) * self.activation(self.gate(x)))


class NormedOutput(nnx.Module):
  """y = W_out norm_per_head(o), the output of DeltaNet."""

  def __init__(self, d_model, num_heads, value_dim, *, eps: float, rngs):
    heads = {'heads': num_heads, 'head_dim': value_dim}
    self.norm = RMSNorm(value_dim, eps=eps)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)

  def __call__(self, o: jax.Array, x: jax.Array) -> jax.Array:
    """Maps heads o [B, T, N, V] to [B, T, D]; the input x does not matter."""
    return self.out(self.norm(o))
