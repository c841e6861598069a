"""Attention inside hash buckets: Reformer (Kitaev et al. 2001.04451).

    h(x) = argmax [x R; -x R],                    R in R^{H x b/2}, b buckets
    o_t = sum_s softmax_s(q_t . k_s - log n_ts) v_s,   k_s = q_s / |q_s|

where s runs over all rounds of hashing; in one round over the earlier tokens of
t's bucket, t itself excepted, in chunks of m: the chunk of t and the one before
it. n_ts is in how many rounds t sees s, so that every key counts once. A token
that sees no other sees itself.

A round sorts the tokens by bucket, stably: O(T log T), then O(T m H). Chunks
start anew with every bucket, so that the chunk of a token does not depend on
what follows it. In `sorted_chunk_attention`, as published, chunks run across
buckets and rounds: later tokens move their borders, and with them what earlier
tokens see, by which a decoder learns of its future.

Hashing costs O(T H b): with b in proportion to T as advised, b = 2 T / m, that
is O(T^2). Several factors b = b_1 b_2 .. cost O(T H (b_1 + b_2 + ..)).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops.products import product
from efficient_attn.ops.routed.selected_blocks import block_attention, positions
from efficient_attn.ops.routed.selected_tiles import deal
from efficient_attn.ops.softmax.attention_merge import merge_attention
from efficient_attn.ops.softmax.stats import Stats
from efficient_attn.values import ConfigError


def lsh_buckets(
  x: Float[Array, 'B T N H'], rotations: Sequence[Float[Array, 'N R H _']]
) -> Int[Array, 'B T N R']:
  """The bucket of every vector in each of R rounds.

  Args:
    x: vectors; their lengths do not matter.
    rotations: one array for each factor of the number of buckets, whose last
      axis is half the factor; none for a single bucket.
  """
  rounds = rotations[0].shape[1] if rotations else 1
  buckets, factor = jnp.zeros((*x.shape[:3], rounds), jnp.int32), 1
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  for rotation in rotations:
    y = product('btnh,nrhc->btnrc', x, rotation.astype(x.dtype))
    y = jnp.concatenate([y, -y], -1)
    buckets += factor * jnp.argmax(y, -1).astype(jnp.int32)
    factor *= y.shape[-1]
  return buckets


def lsh_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S N H'],
  value: Float[Array, 'B S N V'],
  buckets: Int[Array, 'B S N R'],
  *,
  num_buckets: int,
  chunk_size: int,
  causal: bool = True,
  offset: int | Int[Array, ''] = 0,
) -> Float[Array, 'B T N V']:
  """Attention to the other tokens of the bucket, in one or more rounds.

  Args:
    query: queries, of the tokens from `offset` on.
    key: keys: the normalised queries of all tokens.
    value: values.
    buckets: of every token and round, < num_buckets.
    num_buckets: how many there are.
    chunk_size: tokens of a bucket that attend to each other and to as many
      before them.
    causal: whether later tokens are hidden.
    offset: the index of the first query; tokens from offset + T on do not
      exist yet.

  Returns:
    The output, in the query's dtype.
  """
  out, stats = bucket_attention(
    query,
    key,
    value,
    buckets,
    num_buckets=num_buckets,
    chunk_size=chunk_size,
    causal=causal,
    offset=offset,
    scale=1.0,
    own=False,
  )
  own = jax.lax.dynamic_slice_in_dim(value, offset, query.shape[1], 1)
  nothing = stats.total[..., None] == 0
  return jnp.where(nothing, own.astype(out.dtype), out)


def bucket_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S N H'],
  value: Float[Array, 'B S N V'],
  buckets: Int[Array, 'B S N R'],
  *,
  num_buckets: int,
  chunk_size: int,
  causal: bool = True,
  offset: int | Int[Array, ''] = 0,
  scale: float | None = None,
  own: bool = True,
) -> tuple[Float[Array, 'B T N V'], Stats]:
  """`lsh_attention` where a token may see itself (`own`), or nothing."""
  B, T, N, H = query.shape
  S, R = buckets.shape[1], buckets.shape[-1]
  if chunk_size < 1:
    raise ConfigError(f'chunk_size is {chunk_size}; it must be at least 1.')
  count = (S + num_buckets * (chunk_size - 1)) // chunk_size
  there = jnp.arange(S)[:, None, None] < offset + T
  ids = jnp.where(there, buckets, -1).transpose(0, 2, 3, 1)
  plan = functools.partial(
    deal, number=num_buckets, rows=chunk_size, count=count
  )
  target, source, _, first = jax.vmap(plan)(ids.reshape(-1, S))
  tile = target // chunk_size
  start = jnp.take_along_axis(first, ids.reshape(-1, S), 1)
  chunk = (tile - start).reshape(B, N, R, S).transpose(0, 3, 1, 2)

  def rounds(x):  # [B, T, N, *] to [B, T, N R, *], a head for every round
    x = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], R, *x.shape[3:]))
    return x.reshape(B, T, N * R, *x.shape[4:])

  def new(x):  # of all tokens to those of the queries
    return jax.lax.dynamic_slice_in_dim(x, offset, T, 1)

  tile = new(tile.reshape(B, N * R, S).transpose(0, 2, 1))
  before = new(chunk).reshape(B, T, N * R) > 0
  # Chunks have numbers, each one more than the one before it in its bucket.
  numbers = buckets * (S // chunk_size + 2) + chunk
  marks = jnp.broadcast_to(positions(S), (B, S, N)), numbers
  out, stats, _ = block_attention(
    rounds(query),
    key,
    value,
    jnp.stack([tile, jnp.where(before, tile - 1, -1)], -1),
    block_size=chunk_size,
    members=source.reshape(B, N * R, count, chunk_size),
    bias=functools.partial(_bias, causal=causal, own=own),
    query_marks=jax.tree.map(lambda x: rounds(new(x)), marks),
    key_marks=marks,
    scale=scale,
  )
  out = jnp.moveaxis(out.reshape(B, T, N, R, -1), 3, 0)
  stats = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(B, T, N, R), 3, 0), stats
  )
  return merge_attention(out, stats)


def _bias(query, key, *, causal, own):
  """-log n of the pairs that may be, from positions and numbers of chunks."""
  (query, query_chunks), (key, key_chunks) = query, key
  admitted = key < query if causal else key != query
  if own:
    admitted |= key == query
  since = (query_chunks - key_chunks).astype(jnp.uint32)
  times = jnp.sum(since <= 1, -1)
  return jnp.where(admitted, -jnp.log(jnp.maximum(times, 1.0)), -jnp.inf)


def sorted_chunk_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T N H'],
  value: Float[Array, 'B T N V'],
  buckets: Int[Array, 'B T N R'],
  *,
  num_buckets: int,
  chunk_size: int,
  causal: bool = True,
) -> Float[Array, 'B T N V']:
  """The published batching, for encoders and to read published weights.

  The tokens of all rounds, sorted by round and bucket, are cut into chunks that
  see themselves and the chunk before, cyclically, whatever the buckets; a key
  counts as often as it is seen.
  """
  B, T, N, H = query.shape
  R = buckets.shape[-1]
  if T % chunk_size:
    raise ConfigError(
      f'chunk_size = {chunk_size} does not divide T = {T}; pad the sequence.'
    )
  number = R * T // chunk_size
  keys = buckets + num_buckets * jnp.arange(R)
  keys = jnp.moveaxis(keys, 3, 1).reshape(B, R * T, N)
  order = jnp.argsort(keys, 1)
  tile = jnp.argsort(order, 1) // chunk_size
  before = (tile - 1) % number if number > 1 else jnp.full_like(tile, -1)

  def rounds(x):
    return jnp.tile(x, (1, R) + (1,) * (x.ndim - 2))

  def bias(query, key):
    return jnp.where(key < query if causal else key != query, 0.0, -jnp.inf)

  out, stats, _ = block_attention(
    rounds(query),
    key,
    value,
    jnp.stack([tile, before], -1),
    block_size=chunk_size,
    members=(order % T).transpose(0, 2, 1).reshape(B, N, number, chunk_size),
    bias=bias,
    query_marks=rounds(positions(T)),
    key_marks=positions(T),
    scale=1.0,
  )
  out = jnp.moveaxis(out.reshape(B, R, T, N, -1), 1, 0)
  stats = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(B, R, T, N), 1, 0), stats
  )
  out, stats = merge_attention(out, stats)
  nothing = stats.total[..., None] == 0
  return jnp.where(nothing, value.astype(out.dtype), out)
