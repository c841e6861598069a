"""The loops behind `selected_blocks.block_attention`, forward and backward.

A chunk of queries at a time, the pairs (query, block) are dealt to tiles of one
block each, and a group of tiles at a time is attended:

    s = scale q k^T + bias     m_j = max s     l_j = sum e^(s - m_j)
    o_j = softmax(s) v

for the tile of pair j; a query's pairs are then merged to o, m and l. The
backward pass makes the same tiles and recomputes p = exp(s - m) / l; with
d = rowsum(do * out) - l dl,

    dv += p^T do   ds = p * (do v^T - d)   dq = sum_j ds k   dk += ds^T q

so that nothing is kept but the inputs, out, m and l.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from efficient_attn.ops.products import product
from efficient_attn.ops.softmax.attention_merge import merge_attention
from efficient_attn.ops.softmax.stats import Stats, exp_below, largest


@dataclasses.dataclass(frozen=True)
class Options:
  """What is static about a call, beside shapes.

  Attributes:
    scale: factor of the logits.
    bias: what marks add to them, or None.
    number: blocks.
    rows: queries of a tile.
    count: tiles of a chunk of queries.
    steps: groups that these tiles are attended in.
    chunks: chunks of queries.
    block_size: keys of a block.
    length: keys.
  """

  scale: float
  bias: Callable[[Any, Any], Array] | None
  number: int
  rows: int
  count: int
  steps: int
  chunks: int
  block_size: int
  length: int


class Choice(NamedTuple):
  """What is chosen, all of it without gradients.

  Attributes:
    blocks: [L, T, J], the blocks of every query, or -1.
    members: [L, I, C], the keys of every block, or None.
    query_marks: tree of [L, T, *].
    key_marks: tree of what is laid out like the keys.
  """

  blocks: Array
  members: Array | None
  query_marks: Any
  key_marks: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(options, query, key, value, choice):
  """Queries [L, T, G, H] of L choices to out, Stats, and those of every pair.

  Keys and values are [E, I, C, *] in blocks, or [E, S, *] if `choice.members`
  names them, where E divides L.
  """
  members, key_marks = choice.members, choice.key_marks

  def chunk(inputs):
    query, blocks, marks = inputs
    J = blocks.shape[2]
    target, groups = _deal(options, blocks, members)

    def group(part):
      tile = _tile(options, query, key, value, marks, key_marks, part, J)
      top = largest(tile.logits)
      weights = exp_below(tile.logits, top[..., None])
      stats = Stats(top, jnp.sum(weights, axis=-1))
      out = _dot('zrc,zcv->zrv', weights.astype(value.dtype), tile.value)
      return stats.divide(out), stats

    found = _map(options.steps, group, groups)
    out, stats = jax.tree.map(
      lambda x: _of_pairs(_rows_first(x), target, J, 0), found
    )
    parts = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), stats)
    return *merge_attention(out, stats), parts

  split = functools.partial(_split, options.chunks)
  inputs = jax.tree.map(split, (query, choice.blocks, choice.query_marks))
  found = _map(options.chunks, chunk, inputs)
  out, stats, parts = jax.tree.map(_join, found)
  return out.astype(query.dtype), stats, parts


def _forward(options, query, key, value, choice):
  out, stats, parts = attend(options, query, key, value, choice)
  return (out, stats, parts), (query, key, value, choice, out, stats)


def _backward(options, residuals, cotangents):
  query, key, value, choice, out, (top, total) = residuals
  dout, (_, dtotal), _ = cotangents  # top has no gradient
  members, key_marks = choice.members, choice.key_marks
  stats = total.dtype
  delta = jnp.sum(dout.astype(stats) * out.astype(stats), -1) - total * dtotal
  share = jnp.where(total == 0, 0, 1 / total)  # of a weight 1

  def chunk(carry, inputs):
    query, blocks, marks, *rows = inputs
    J = blocks.shape[2]
    target, groups = _deal(options, blocks, members)

    def group(carry, part):
      dkey, dvalue = carry
      tile = _tile(options, query, key, value, marks, key_marks, part, J)
      do, delta, share, top = (_take(x, part[0] // J) for x in rows)
      p = exp_below(tile.logits, top[..., None]) * share[..., None]
      dp = _dot('zrv,zcv->zrc', do, tile.value)
      ds = options.scale * p * (dp - delta[..., None])
      ds, p = ds.astype(query.dtype), p.astype(value.dtype)
      dq = _dot('zrc,zch->zrh', ds, tile.key)
      dk, dv = _sums(ds, tile.query), _sums(p, do)
      return (_add(dkey, dk, part[1]), _add(dvalue, dv, part[1])), dq

    carry, dq = lax.scan(group, carry, groups)
    return carry, jnp.sum(_of_pairs(_rows_first(dq), target, J, 0), 0)

  inputs = query, choice.blocks, choice.query_marks, dout, delta, share, top
  inputs = jax.tree.map(functools.partial(_split, options.chunks), inputs)
  carry = jnp.zeros(key.shape, stats), jnp.zeros(value.shape, stats)
  (dkey, dvalue), dquery = lax.scan(chunk, carry, inputs)
  return (
    _join(dquery).astype(query.dtype),
    dkey.astype(key.dtype),
    dvalue.astype(value.dtype),
    None,
  )


attend.defvjp(_forward, _backward)


def deal(
  ids: Int[Array, 'P'], *, number: int, rows: int, count: int
) -> tuple[Int[Array, 'P'], Int[Array, '_'], Int[Array, '_'], Int[Array, '_']]:
  """Deals things of kinds `ids` < `number` to `count` tiles of one kind each.

  Things of a kind keep their order and fill tiles of `rows` one by one; those
  of kind -1 are left out.

  Returns:
    target: [P], the row of each thing, count * rows for one left out.
    source: [count * rows], the thing in each row, -1 in an empty one.
    owner: [count], the kind of each tile; of an empty one, any.
    first: [number], the first tile of each kind.
  """
  ids = jnp.where(ids < 0, number, ids)
  order = jnp.argsort(ids)
  counts = jnp.zeros(number + 1, jnp.int32).at[ids].add(1)
  before = jnp.cumsum(counts) - counts
  tiles = -(-counts // rows)
  ends = jnp.cumsum(tiles)
  first = ends - tiles
  kind = ids[order]
  rank = jnp.arange(ids.size) - before[kind]
  row = jnp.where(kind < number, first[kind] * rows + rank, count * rows)
  target = jnp.zeros_like(row).at[order].set(row)
  source = jnp.full(count * rows, -1, row.dtype)
  source = source.at[row].set(order, mode='drop')
  passed = jnp.zeros(count + 1, jnp.int32).at[ends[:-1]].add(1)
  owner = jnp.minimum(jnp.cumsum(passed[:-1]), number - 1)
  return target, source, owner, first[:-1]


def _deal(options, blocks, members):
  """The row of every pair [L, P], and groups of (source, key index, there).

  The source [steps, L, Y, R] is a pair; the index is [steps, L, Y], blocks, or
  [steps, L, Y, C], keys; `there` is [steps, L, Y, C].
  """
  number, rows, count = options.number, options.rows, options.count
  plan = functools.partial(deal, number=number, rows=rows, count=count)
  target, source, index, _ = jax.vmap(plan)(blocks.reshape(blocks.shape[0], -1))
  source = source.reshape(*source.shape[:1], count, rows)
  if members is None:
    size = options.block_size
    there = index[..., None] * size + jnp.arange(size) < options.length
  else:
    index = _take(members, index)
    there = index >= 0
  split = functools.partial(_split, options.steps)
  return target, jax.tree.map(split, (source, index, there))


class _Tile(NamedTuple):
  query: Array  # [L, Y, R, G, H]
  key: Array  # [L, Y, C, H]
  value: Array  # [L, Y, C, V]
  logits: Array  # [L, Y, R, G, C]


def _tile(options, query, key, value, query_marks, key_marks, part, J):
  source, index, there = part
  q, rows = jax.tree.map(lambda x: _take(x, source // J), (query, query_marks))
  k, v, cols = jax.tree.map(lambda x: _fetch(x, index), (key, value, key_marks))
  logits = options.scale * _dot('zrh,zch->zrc', q, k)
  if options.bias is not None:
    rows = jax.tree.map(lambda x: jnp.expand_dims(x, 3), rows)
    cols = jax.tree.map(lambda x: jnp.expand_dims(x, 2), cols)
    logits += options.bias(rows, cols)[..., None, :].astype(logits.dtype)
  admitted = (source >= 0)[..., None] & there[:, :, None]
  return _Tile(q, k, v, jnp.where(admitted[:, :, :, None], logits, -jnp.inf))


def _dot(spec, x, y):
  """A product of [L, Y, R, G, *] and [L, Y, C, *] for every tile.

  One batch axis and a group folded into rows make it one plain batched product.
  """
  L, Y, R, G, _ = x.shape
  x, y = x.reshape(L * Y, R * G, -1), y.reshape(L * Y, *y.shape[2:])
  x = product(spec, x, y)
  return x.reshape(L, Y, R, G, -1)


def _sums(x, y):
  """Sums over the rows of [L, Y, R, G, C] times [L, Y, R, G, *]."""
  L, Y, R, G, C = x.shape
  x, y = (z.reshape(L * Y, R * G, -1) for z in (x, y))
  x = product('zrc,zrh->zch', x, y)
  return x.reshape(L, Y, C, -1)


def _take(x, index):
  """x[l, index[l]] for every l."""
  return jax.vmap(lambda x, i: x[i])(x, index)


def _fetch(x, index):
  """The keys [L, Y, C, *] of tiles; each of x serves L / E choices."""
  grouped = index.reshape(x.shape[0], -1, *index.shape[2:])
  found = _take(x, grouped)
  return found.reshape(*index.shape[:2], -1, *found.shape[3:])


def _add(total, tiles, index):
  """The transpose of `_fetch`, on top of `total`."""
  grouped = index.reshape(total.shape[0], -1, *index.shape[2:])
  tiles = tiles.reshape(*grouped.shape[:2], *tiles.shape[2:])
  return jax.vmap(lambda x, i, y: x.at[i].add(y))(total, grouped, tiles)


def _split(steps, x):
  """[L, steps * Y, *] to [steps, L, Y, *]."""
  x = x.reshape(x.shape[0], steps, -1, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _join(x):
  """The inverse of `_split`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _rows_first(x):
  """[steps, L, Y, R, G, *] to the rows of all tiles, [L, P, G, *]."""
  x = _join(x)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _of_pairs(x, target, J, empty):
  """Rows [L, P, G, *] to the pairs of every query, [J, L, T, G, *]."""
  x = jax.vmap(lambda x, i: x.at[i].get(mode='fill', fill_value=empty))(
    x, target
  )
  x = x.reshape(x.shape[0], -1, J, *x.shape[2:])
  return jnp.moveaxis(x, 2, 0)


def _map(steps, f, xs):
  """`lax.map` that does not loop once."""
  if steps > 1:
    return lax.map(f, xs)
  first = f(jax.tree.map(lambda x: x[0], xs))
  return jax.tree.map(lambda x: x[None], first)
