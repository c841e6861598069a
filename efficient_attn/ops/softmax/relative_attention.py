"""Attention with relative positions and a memory: Transformer-XL.

Dai et al. (1901.02860). With r_d = W_R sinusoid(d),

  o_t = sum_s softmax_s(((q_t + u) . k_s + (q_t + w) . r_{t-s}) / sqrt(H)) v_s

The products with all r_d are one matrix, of which the relative shift moves
row t by t. A token sees itself and the `memory` tokens before it, which is the
paper's recurrence over segments cut as finely as possible (`same_length` in
the authors' code): the result does not depend on where calls or blocks begin.
Blocks of `memory` tokens see themselves and the block before:
O(T memory) time and memory. `relative_attention` is the reference.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.ops import chunks
from efficient_attn.ops.positions import sinusoidal
from efficient_attn.ops.products import product
from efficient_attn.ops.shapes import check_shapes
from efficient_attn.ops.softmax.logits import attend_logits, heads_first
from efficient_attn.values import ConfigError


class Memory(NamedTuple):
  """The last `memory` keys and values, and how long the last segment is."""

  key: Float[Array, 'B M N H']
  value: Float[Array, 'B M N V']
  length: Int[Array, 'B']


def relative_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S N H'],
  value: Float[Array, 'B S N V'],
  relative: Float[Array, 'R N H'],
  content_bias: Float[Array, 'N H'],
  position_bias: Float[Array, 'N H'],
  *,
  mask: Bool[Array, '#B T S'] | None = None,
  rows: Int[Array, 'T S'] | None = None,
) -> Float[Array, 'B T N V']:
  """Attention of the last T of S tokens, whole matrices of logits at once.

  Args:
    query: queries of the last T positions.
    key: keys of all S positions.
    value: their values.
    relative: r_d for d = S - 1, S - 2, ..., as far as the mask admits: S rows
      for a causal mask, S + T - 1 without one.
    content_bias: u.
    position_bias: w.
    mask: whether a query sees a key, the same for all heads.
    rows: the row of `relative` for each query and key, where distances are not
      those of consecutive positions.

  Returns:
    The output in the values' dtype.
  """
  content = product(
    'bnth,bnsh->bnts', heads_first(query + content_bias), heads_first(key)
  )
  position = product(
    'nbth,nrh->nbtr',
    (query + position_bias).transpose(2, 0, 1, 3),
    relative.swapaxes(0, 1),
  ).swapaxes(0, 1)
  if rows is None:
    position = relative_shift(position, key.shape[1])
  else:
    position = jnp.take_along_axis(position, rows[None, None], axis=-1)
  logits = (content + position) * query.shape[-1] ** -0.5
  return attend_logits(
    logits, value, mask=None if mask is None else mask[:, None]
  )


def relative_shift(
  x: Float[Array, '*B T R'], length: int
) -> Float[Array, '*B T {length}']:
  """y[t, s] = x[t, s + T - 1 - t], S = `length`; rows past R are anything."""
  *lead, T, R = x.shape
  width = length + T
  # Cut from the flattened rows, a row one shorter starts one later each time.
  x = jnp.pad(x, [(0, 0)] * (len(lead) + 1) + [(0, width - R)])
  x = x.reshape(*lead, T * width)[..., T - 1 :][..., : T * (width - 1)]
  return x.reshape(*lead, T, width - 1)[..., :length]


def relative_rows(
  first: int, last: int, weight: Float[Array, 'D N H']
) -> Float[Array, 'R N H']:
  """r_d = W_R sinusoid(d) for d = first, first - 1, ..., last."""
  dtype = jnp.promote_types(weight.dtype, jnp.float32)
  distances = jnp.arange(first, last - 1, -1, dtype=dtype)
  waves = sinusoidal(distances, weight.shape[0]).astype(weight.dtype)
  return jnp.einsum('rd,dnh->rnh', waves, weight)


def transformer_xl(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T N H'],
  value: Float[Array, 'B T N V'],
  weight: Float[Array, 'D N H'],
  content_bias: Float[Array, 'N H'],
  position_bias: Float[Array, 'N H'],
  *,
  memory: int,
  segment_ids: Int[Array, 'B T'] | None = None,
  initial_state: Memory | None = None,
  bidirectional: bool = False,
) -> tuple[Float[Array, 'B T N V'], Memory | None]:
  """Attention over the last `memory` tokens, or in both directions over all.

  Args:
    query: queries.
    key: keys.
    value: values.
    weight: W_R.
    content_bias: u.
    position_bias: w.
    memory: how many tokens before itself a token sees.
    segment_ids: nothing is seen across a token whose id differs from the one
      before it. Token 0 continues `initial_state`.
    initial_state: the tokens before token 0. No gradient flows into it.
    bidirectional: every token sees every token, O(T^2); there is no memory.

  Returns:
    The output in the values' dtype, and the memory after the last token (None
    if bidirectional).
  """
  if memory < 1:
    raise ConfigError(f'memory = {memory}: pass 1 or more tokens.')
  biases = content_bias, position_bias
  B, T, N, H = query.shape
  check_shapes(
    {
      'key': (key, query.shape),
      'value': (value, (B, T, N, value.shape[-1])),
      'weight': (weight, (weight.shape[0], N, H)),
      'content_bias': (content_bias, (N, H)),
      'position_bias': (position_bias, (N, H)),
      'segment_ids': (segment_ids, (B, T)),
    }
  )
  counts = jnp.zeros((B, T), jnp.int32)
  if segment_ids is not None:
    counts = chunks.segment_counts(segment_ids)
  if bidirectional:
    same = counts[:, :, None] == counts[:, None, :]
    relative = relative_rows(T - 1, 1 - T, weight)
    out = relative_attention(query, key, value, relative, *biases, mask=same)
    return out, None

  state = initial_state
  if state is None:
    past = jnp.zeros_like(key, shape=(B, memory, *key.shape[2:]))
    past_values = jnp.zeros_like(value, shape=(B, memory, *value.shape[2:]))
    state = Memory(past, past_values, jnp.zeros(B, jnp.int32))
  state = jax.lax.stop_gradient(state)
  length = jnp.sum(counts == counts[:, -1:], axis=1, dtype=jnp.int32)
  after = Memory(
    behind(state.key, key)[:, -memory:],
    behind(state.value, value)[:, -memory:],
    length + jnp.where(counts[:, -1] == 0, state.length, 0),
  )

  size = min(T, memory)
  blocks = -(-T // size)
  left = 0 if blocks == 1 and initial_state is None else memory
  queries = cut(query[:, :0], query, size)
  keys = cut(state.key[:, :left].astype(key.dtype), key, size)
  values = cut(state.value[:, :left].astype(value.dtype), value, size)
  ids = cut(counts[:, :0], counts, size)
  others = cut(jnp.zeros_like(counts, shape=(B, left)), counts, size)
  index = jnp.arange(left + size)
  distance = left + jnp.arange(size)[:, None] - index
  start = jnp.arange(blocks)[:, None] * size - left
  seen = start + index >= -state.length[:, None, None]
  mask = (
    seen[:, :, None]
    & (distance >= 0)
    & (distance <= memory)
    & (ids[..., :, None] == others[..., None, :])
  )

  def fold(x):
    return x.reshape(-1, *x.shape[2:])

  out = relative_attention(
    *map(fold, (queries, keys, values)),
    relative_rows(left + size - 1, 0, weight),
    *biases,
    mask=fold(mask),
  )
  return out.reshape(B, blocks * size, *out.shape[2:])[:, :T], after


def behind(past: Array, x: Array) -> Array:
  """The past and the tokens x behind it, in the dtype of the past."""
  return jnp.concatenate([past, x.astype(past.dtype)], axis=1)


def cut(past: Array, x: Array, size: int) -> Array:
  """Blocks of `size` tokens, each behind the P tokens before it.

  Args:
    past: [B, P, ...], the tokens before x; P is 0, or `size` if x has more
      than one block.
    x: [B, T, ...].
    size: of a block; the last one is filled up with zeros.

  Returns:
    [B, ceil(T / size), P + size, ...].
  """
  B, T, *rest = x.shape
  blocks = -(-T // size)
  padding = [(0, 0), (0, blocks * size - T)] + [(0, 0)] * len(rest)
  x = jnp.pad(x, padding).reshape(B, blocks, size, *rest)
  if not past.shape[1]:
    return x
  if blocks == 1:
    return jnp.concatenate([past[:, None], x], axis=2)
  before = jnp.concatenate([past[:, None], x[:, :-1]], axis=1)
  return jnp.concatenate([before, x], axis=2)
