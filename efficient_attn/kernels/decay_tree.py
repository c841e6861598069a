"""Decays of all spans of a chunk under channel gates, as a binary tree.

A pair of tokens i > j is of the level s, the highest bit in which i and j
differ: they stand in the second and the first half of one block of 2 s tokens,
and the decay of the span (j, i] is what follows j in its half times what
precedes i in the other,

  a_(j, i] = before_s[i] after_s[j].

So the scores of a level are one matrix product, and the levels 1, 2, 4, ...
cover the triangle. From level to level a half that lengthens is multiplied by
the product of the other half. There are only products of numbers in [0, 1]: no
sum of logarithms cancels, nothing overflows, and a decay of zero is exact.

Arrays are [C / 8, 8, H], tiles of 8 tokens, so that a block of 8 and more moves
in whole tiles. The adjoint runs down the same tree and adds, also without
cancellation: q dq - k dk, the usual identity, loses the gate's gradient to the
rounding of bfloat16 operands.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.kernels.layout import CHUNK, NT, iota

TILE = 8
LEVELS = tuple(1 << i for i in reversed(range(CHUNK.bit_length() - 1)))


def tiles(x):
  """[C, X] to [C / 8, 8, X]."""
  return x.reshape(-1, TILE, x.shape[-1])


def flat(x):
  """[..., 8, X] to [tokens, X]."""
  return x.reshape(-1, x.shape[-1])


def halves(x, size):
  """Tiles to the first and second halves of blocks, [blocks, tiles, 8, X]."""
  x = x.reshape(-1, 2, size // TILE, TILE, x.shape[-1])
  return x[:, 0], x[:, 1]


def join(first, second):
  """The inverse of `halves`."""
  return jnp.stack([first, second], 1).reshape(-1, TILE, first.shape[-1])


def _row_halves(x, size):
  """The same for rows [C, X]: [blocks, size, X] each."""
  x = x.reshape(-1, 2, size, x.shape[-1])
  return x[:, 0], x[:, 1]


def times(x, decay):
  """Returns x decayed; None is no decay."""
  return x if decay is None else x * decay


def _or_ones(decay):
  return 1.0 if decay is None else decay


def _is_second(x, size):
  """Whether a token of [C / 8, 8, X] is in a second half, size < 8."""
  return (jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) & size) != 0


def _of_sibling(x, size):
  """The values of the other half's token at the same place, size < 8."""
  if size == TILE // 2:
    return pltpu.roll(x, size, 1)
  return jnp.where(
    _is_second(x, size), pltpu.roll(x, size, 1), pltpu.roll(x, TILE - size, 1)
  )


def build(decay, inclusive):
  """The tree of decays [C, H].

  Args:
    decay: of every token, in [0, 1].
    inclusive: whether `before` has the decay of the token itself.

  Returns:
    levels: block size -> (before, after), [C / 8, 8, H], or None for ones;
      the size C stands for the whole chunk.
    total: the decay of the chunk, [1, H].
  """
  total = tiles(decay)
  after = None
  before = total if inclusive else None
  levels = {1: (before, after)}
  size = 1
  while size < TILE:
    second, other = _is_second(total, size), _of_sibling(total, size)
    before = jnp.where(second, times(other, before), _or_ones(before))
    after = jnp.where(second, _or_ones(after), times(other, after))
    total = total * other
    size *= 2
    levels[size] = before, after
  while size < CHUNK:
    # Every tile of `total` is of a block: its product in all 8 rows.
    total = total.reshape(-1, 2, 1, TILE, total.shape[-1])
    first, second = total[:, 0], total[:, 1]
    before, after = halves(before, size), halves(after, size)
    before = join(before[0], before[1] * first)
    after = join(after[0] * second, after[1])
    total = first * second
    size *= 2
    levels[size] = before, after
  return levels, flat(total)[:1]


def scores(queries, k, levels, dot, inclusive):
  """sum_h q_ih k_jh a_h(j, i] for j < i, and q_i . k_i if inclusive: [C, C].

  Args:
    queries: list of q, [C / 8, 8, H], which share the keys and the decays.
    k: [C / 8, 8, H].
    levels: of `build`.
    dot: a matrix product.
    inclusive: for each q.
  """
  differ = iota(0) ^ iota(1)
  found = [None] * len(queries)
  for size in LEVELS:
    # The columns of first halves stand in both, so that they keep their places.
    rows, columns = _decayed(queries, k, levels, size)
    rows = _stacked([flat(q) for q in rows])
    level = dot(rows, _in_both(columns, size), NT)
    for i, part in enumerate(_split(level, len(queries))):
      if size < TILE:
        found[i] = jnp.where(differ < 2 * size, part, found[i])
      else:
        found[i] = _place(part, found[i], differ, size, 1)
  return _finished(found, iota(0) > iota(1), queries, k, inclusive)


def _place(level, found, differ, size, half):
  """Puts the scores of a level, rows of one half alone, over those above it."""
  rows = level.reshape(-1, size, CHUNK)
  if found is None:
    both = [jnp.zeros_like(rows)] * 2
  else:
    both = list(_row_halves(found, size))
    near = _row_halves(differ, size)[half] < 2 * size
    rows = jnp.where(near, rows, both[half])
  both[half] = rows
  return jnp.stack(both, 1).reshape(CHUNK, CHUNK)


def _with_diagonal(found, strictly, q, k, inclusive):
  if not inclusive:
    return jnp.where(strictly, found, 0)
  own = jnp.sum(flat(q * k), 1, keepdims=True)
  return jnp.where(strictly, found, jnp.where(iota(0) == iota(1), own, 0))


class Adjoint:
  """The gradients of q, k and the gate, from the top of the tree down.

  Args:
    d_before: of the logarithm of `before` of the whole chunk, [C / 8, 8, H].
    d_after: of the logarithm of `after`.
    d_total: of the logarithm of the total, [8, H] of equal rows.
  """

  def __init__(self, d_before, d_after, d_total):
    self.before, self.after = d_before, d_after
    self.total = d_total[None]

  def descend(self, size, d_before, d_after):
    """From blocks of 2 `size` to their halves, whose scores add to them.

    Args:
      size: of the halves.
      d_before: of the logarithms of the level's `before`; of second halves
        alone where `size` >= 8.
      d_after: of its `after`, of first halves.
    """
    if size < TILE:
      second = _is_second(self.before, size)
      sums = jnp.where(second, self.before, self.after)
      width = 1
      while width < size:
        sums = sums + _of_sibling(sums, width)
        width *= 2
      self.total = self.total + _of_sibling(sums, size)
      self.before, self.after = self.before + d_before, self.after + d_after
      return
    first, second = halves(self.before, size)
    to_first = self.total + _tile_sums(second)
    self.before = join(first, second + d_before)
    first, second = halves(self.after, size)
    to_second = self.total + _tile_sums(first)
    self.after = join(first + d_after, second)
    self.total = jnp.stack([to_first, to_second], 1).reshape(
      -1, TILE, first.shape[-1]
    )

  def gate(self, inclusive):
    """The gradient of the logarithms of the decays, [C, H]."""
    return flat(self.before + self.total if inclusive else self.total)


def _tile_sums(x):
  """[blocks, tiles, 8, H] to sums of blocks, in all rows of [blocks, 8, H]."""
  x = jnp.sum(x, 1)
  for shift in (4, 2, 1):
    x = x + pltpu.roll(x, shift, 1)
  return x


def turned_scores(queries, k, levels, dot, inclusive):
  """The transposes of `scores`, [key, query]."""
  found = [None] * len(queries)
  for size in LEVELS:
    rows, keys = _decayed(queries, k, levels, size)
    found = _turned_level(rows, keys, found, dot, size)
  return _finished(found, iota(0) < iota(1), queries, k, inclusive)


def _decayed(queries, k, levels, size):
  """Queries up to their half and keys from theirs, of the tokens that meet."""
  before, after = levels[size]
  if size < TILE:
    return [times(q, before) for q in queries], times(k, after)
  before, after = halves(before, size)[1], halves(after, size)[0]
  return [halves(q, size)[1] * before for q in queries], (
    halves(k, size)[0] * after
  )


def _in_both(x, size):
  """Tokens of one half in the places of both; of all tokens, as they are."""
  return flat(x if size < TILE else join(x, x))


def _turned_level(rows, keys, found, dot, size):
  """Puts the transposed scores of a level over those of the levels above."""
  differ = iota(0) ^ iota(1)
  columns = _stacked([_in_both(q, size) for q in rows])
  level = dot(flat(keys), columns, NT)
  both = []
  for i, above in enumerate(found):
    part = level[:, i * CHUNK : (i + 1) * CHUNK]
    if size < TILE:
      both.append(jnp.where(differ < 2 * size, part, above))
    else:
      both.append(_place(part, above, differ, size, 0))
  return both


def _finished(found, strictly, queries, k, inclusive):
  return [
    _with_diagonal(x, strictly, q, k, own)
    for x, q, own in zip(found, queries, inclusive, strict=True)
  ]


def pull(
  queries,
  k,
  levels,
  d_scores,
  d_scores_t,
  adjoint,
  dot,
  d_queries,
  d_k,
  inclusive,
):
  """Takes the cotangents of `scores` back to the queries, k and the gate.

  Args:
    queries: as in `scores`.
    k: [C / 8, 8, H].
    levels: of `build`.
    d_scores: [C, C] for each q.
    d_scores_t: their transposes.
    adjoint: of the whole chunk, is taken down to single tokens.
    dot: a matrix product.
    d_queries: what the whole chunk gives, [C / 8, 8, H] for each q.
    d_k: the same of the keys.
    inclusive: for each q.

  Returns:
    d_queries and d_k without the diagonal, and what `turned_scores` returns.
  """
  row, column = iota(0), iota(1)
  differ = row ^ column
  found = [None] * len(queries)
  for size in LEVELS:
    before, after = levels[size]
    level = (differ >= size) & (differ < 2 * size)
    rows, keys = _decayed(queries, k, levels, size)
    found = _turned_level(rows, keys, found, dot, size)
    if size < TILE:
      own, own_k = queries, k
      parts = [jnp.where(level & (row > column), x, 0) for x in d_scores]
      parts_t = [jnp.where(level & (row < column), x, 0) for x in d_scores_t]
    else:
      before, after = halves(before, size)[1], halves(after, size)[0]
      own, own_k = [halves(q, size)[1] for q in queries], halves(k, size)[0]

      def part(matrix, half, level=level, size=size):
        kept = jnp.where(level, matrix, 0)
        return _row_halves(kept, size)[half].reshape(-1, CHUNK)

      parts = [part(x, 1) for x in d_scores]
      parts_t = [part(x, 0) for x in d_scores_t]
    of_q = dot(_stacked(parts), _in_both(keys, size))
    of_q = [
      times(x.reshape(own_k.shape), before) for x in _split(of_q, len(queries))
    ]
    of_k = dot(_beside(parts_t), _stacked([_in_both(q, size) for q in rows]))
    of_k = times(of_k.reshape(own_k.shape), after)
    d_before = sum(q * x for q, x in zip(own, of_q, strict=True))
    adjoint.descend(size, d_before, own_k * of_k)
    d_queries = [
      _added(d, x, size, 1) for d, x in zip(d_queries, of_q, strict=True)
    ]
    d_k = _added(d_k, of_k, size, 0)
  found = _finished(found, row < column, queries, k, inclusive)
  return d_queries, d_k, found


def _stacked(arrays):
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _split(x, count):
  """The inverse of `_stacked`."""
  return x.reshape(count, -1, x.shape[-1]) if count > 1 else [x]


def _beside(arrays):
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, 1)


def _added(x, part, size, half):
  """Adds `part` to the first or to the second halves of blocks, or to all."""
  if size < TILE:
    return x + part
  both = list(halves(x, size))
  both[half] = both[half] + part
  return join(*both)
