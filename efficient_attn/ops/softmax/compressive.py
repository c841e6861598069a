"""Attention with a compressed memory: Compressive Transformer.

Rae et al. (1911.05507). A sequence is cut into segments of M tokens. A token
sees its own segment up to itself, the M tokens of the segment before (the
memory), and before those the last P entries of the compressed memory, each
made of `rate` tokens as they leave the memory. Positions are relative as in
Transformer-XL, and count the joined sequence [compressed, memory, segment].
O(T (2 M + P)) time and memory for whole sequences.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops.shapes import check_shapes
from efficient_attn.ops.softmax.relative_attention import (
  behind,
  cut,
  relative_attention,
  relative_rows,
)
from efficient_attn.values import ConfigError


class CompressiveMemory(NamedTuple):
  """What tokens may see of those before them.

  Attributes:
    key: keys of the last 2 M - 1 tokens: the memory and a segment begun.
    value: their values.
    slot_key: keys of the last P + 2 M / rate compressed entries.
    slot_value: their values.
    length: how many tokens came before.
  """

  key: Float[Array, 'B S N H']
  value: Float[Array, 'B S N V']
  slot_key: Float[Array, 'B W N H']
  slot_value: Float[Array, 'B W N V']
  length: Int[Array, '']


def compressive_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T N H'],
  value: Float[Array, 'B T N V'],
  slot_key: Float[Array, 'B C N H'],
  slot_value: Float[Array, 'B C N V'],
  weight: Float[Array, 'D N H'],
  content_bias: Float[Array, 'N H'],
  position_bias: Float[Array, 'N H'],
  *,
  memory: int,
  num_slots: int,
  rate: int,
  initial_state: CompressiveMemory | None = None,
) -> tuple[Float[Array, 'B T N V'], CompressiveMemory | None]:
  """Attention over the segment, the memory and the compressed memory.

  Args:
    query: queries.
    key: keys.
    value: values.
    slot_key: keys of what every `rate` tokens are compressed to, in order.
      Entry 0 is of the first block that is not complete at `initial_state`;
      entries of blocks that are not complete yet play no role.
    slot_value: their values.
    weight: W_R.
    content_bias: u.
    position_bias: w.
    memory: M, the tokens of a segment and of the memory.
    num_slots: P, the entries of the compressed memory.
    rate: how many tokens an entry stands for; divides M.
    initial_state: the tokens before token 0, or None for a whole sequence.

  Returns:
    The output in the values' dtype, and the state after the last token (None
    for a whole sequence).
  """
  if memory < 1 or rate < 1 or memory % rate:
    raise ConfigError(
      f'memory = {memory} must be a positive multiple of rate = {rate}.'
    )
  B, T, N, H = query.shape
  entries, V = slot_key.shape[1], value.shape[-1]
  check_shapes(
    {
      'key': (key, query.shape),
      'value': (value, (B, T, N, V)),
      'slot_key': (slot_key, (B, entries, N, H)),
      'slot_value': (slot_value, (B, entries, N, V)),
      'weight': (weight, (weight.shape[0], N, H)),
      'content_bias': (content_bias, (N, H)),
      'position_bias': (position_bias, (N, H)),
    }
  )
  arrays = query, key, value, slot_key, slot_value
  biases = content_bias, position_bias
  # The longest distance is from the end of a segment to the first entry.
  relative = relative_rows(num_slots + 2 * memory - 1, 0, weight)
  if initial_state is None:
    return _whole(*arrays, relative, biases, memory, num_slots, rate), None
  return _continued(
    *arrays, relative, biases, memory, num_slots, rate, initial_state
  )


def _whole(
  query, key, value, slot_key, slot_value, relative, biases, memory, slots, rate
):
  """All segments of a sequence at once."""
  B, T = query.shape[:2]
  size = min(T, memory)
  blocks = -(-T // size)
  queries = cut(query[:, :0], query, size)
  if blocks == 1:
    mask = jnp.tri(T, dtype=bool)[None]
    relative = relative[len(relative) - T :]
    return relative_attention(query, key, value, relative, *biases, mask=mask)
  # The entries that each segment sees, of which those before 0 do not exist.
  ends = (jnp.arange(blocks) - 1) * (memory // rate)
  index = ends[:, None] - slots + jnp.arange(slots)

  def joined(x, entries):
    none = jnp.zeros_like(x, shape=(B, memory, *x.shape[2:]))
    entries = jnp.take(entries, jnp.maximum(index, 0), axis=1, mode='clip')
    return jnp.concatenate([entries, cut(none, x, size)], axis=2)

  keys, values = joined(key, slot_key), joined(value, slot_value)
  first = jnp.arange(blocks)[:, None] == 0
  exists = jnp.concatenate(
    [index >= 0, jnp.repeat(~first, memory, 1), jnp.ones((blocks, size), bool)],
    axis=1,
  )
  causal = jnp.tri(size, slots + 2 * memory, slots + memory, dtype=bool)
  mask = causal & exists[:, None]
  mask = jnp.broadcast_to(mask, (B, *mask.shape))

  def fold(x):
    return x.reshape(-1, *x.shape[2:])

  out = relative_attention(
    *map(fold, (queries, keys, values)), relative, *biases, mask=fold(mask)
  )
  return out.reshape(B, blocks * size, *out.shape[2:])[:, :T]


def _continued(
  query,
  key,
  value,
  slot_key,
  slot_value,
  relative,
  biases,
  memory,
  slots,
  rate,
  state,
):
  """New tokens behind a state that may end anywhere in a segment."""
  T, past, kept = query.shape[1], state.key.shape[1], state.slot_key.shape[1]
  state, length = jax.lax.stop_gradient(state), state.length
  keys, values = behind(state.key, key), behind(state.value, value)
  slot_keys = behind(state.slot_key, slot_key)
  slot_values = behind(state.slot_value, slot_value)

  position = length + jnp.arange(T)[:, None]
  begins = position // memory * memory - memory  # of the memory
  token = length - past + jnp.arange(past + T)
  entry = length // rate - kept + jnp.arange(slot_keys.shape[1])
  entries = begins // rate  # complete and before the memory
  mask = jnp.concatenate(
    [
      (entry >= jnp.maximum(entries - slots, 0)) & (entry < entries),
      (token >= jnp.maximum(begins, 0)) & (token <= position),
    ],
    axis=1,
  )
  distance = jnp.concatenate(
    [position - begins + entries - entry, position - token], axis=1
  )
  longest = len(relative) - 1
  out = relative_attention(
    query,
    jnp.concatenate([slot_keys, keys], axis=1).astype(key.dtype),
    jnp.concatenate([slot_values, values], axis=1).astype(value.dtype),
    relative,
    *biases,
    mask=mask[None],
    rows=longest - jnp.clip(distance, 0, longest),
  )

  complete = (length + T) // rate - length // rate

  def newest(x):
    return jax.lax.dynamic_slice_in_dim(x, complete, kept, axis=1)

  return out, CompressiveMemory(
    keys[:, T:],
    values[:, T:],
    newest(slot_keys),
    newest(slot_values),
    length + T,
  )


def init_memory(
  batch: int,
  heads: tuple[int, int],
  dtype,
  *,
  memory: int,
  num_slots: int,
  rate: int,
) -> CompressiveMemory:
  """The state before any token."""
  tokens = (batch, 2 * memory - 1, *heads)
  slots = (batch, num_slots + 2 * memory // rate, *heads)
  buffers = [
    jnp.zeros(shape, dtype) for shape in (tokens, tokens, slots, slots)
  ]
  return CompressiveMemory(*buffers, jnp.zeros((), jnp.int32))


def complete_blocks(
  x: Float[Array, 'B T D'],
  rate: int,
  tail: Float[Array, 'B W D'] | None = None,
  length: Int[Array, ''] | int = 0,
) -> tuple[Float[Array, 'B C rate D'], Float[Array, 'B W D'] | None]:
  """The blocks of `rate` tokens that x may complete, and the tokens behind.

  Args:
    x: new tokens.
    rate: tokens of a block.
    tail: the rate - 1 tokens before x; None for a whole sequence.
    length: how many tokens came before x. Blocks start at its multiples.

  Returns:
    The blocks, of which the last may not be complete yet, and the new tail.
  """
  B, T, D = x.shape
  if tail is None:
    count = T // rate
    return x[:, : count * rate].reshape(B, count, rate, D), None
  count = (T + rate - 1) // rate
  joined = behind(behind(tail, x), jnp.zeros_like(tail))
  start = rate - 1 - length % rate
  blocks = jax.lax.dynamic_slice_in_dim(joined, start, count * rate, axis=1)
  return blocks.reshape(B, count, rate, D), joined[:, T : T + rate - 1]
