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

from efficient_attn.kernels.additive.layout import CHUNK, NT, iota

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


def scores(q, k, levels, dot, inclusive):
  """sum_h q_ih k_jh a_h(j, i] for j < i, and q_i . k_i if inclusive: [C, C]."""
  differ = iota(0) ^ iota(1)
  found = None
  for size in LEVELS:
    before, after = levels[size]
    if size < TILE:
      level = dot(flat(times(q, before)), flat(times(k, after)), NT)
      found = jnp.where(differ < 2 * size, level, found)
      continue
    # Rows of second halves; the columns of first halves stand in both, so
    # that they keep their places.
    rows = halves(q, size)[1] * halves(before, size)[1]
    columns = halves(k, size)[0] * halves(after, size)[0]
    level = dot(flat(rows), flat(join(columns, columns)), NT)
    found = _place(level, found, differ, size, 1)
  return _with_diagonal(found, iota(0) > iota(1), q, k, inclusive)


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


def pull(q, k, levels, d_scores, d_scores_t, adjoint, dot, d_q, d_k, inclusive):
  """Takes the cotangent of `scores` back to q, k and the gate.

  Args:
    q: [C / 8, 8, H].
    k: [C / 8, 8, H].
    levels: of `build`.
    d_scores: [C, C].
    d_scores_t: its transpose.
    adjoint: of the whole chunk, is taken down to single tokens.
    dot: a matrix product.
    d_q: what the whole chunk gives, [C / 8, 8, H].
    d_k: the same of the keys.
    inclusive: see `scores`.

  Returns:
    d_q and d_k without the diagonal, and the transpose of the scores.
  """
  row, column = iota(0), iota(1)
  differ = row ^ column
  found = None
  for size in LEVELS:
    before, after = levels[size]
    level = (differ >= size) & (differ < 2 * size)
    if size < TILE:
      queries, keys = flat(times(q, before)), flat(times(k, after))
      found = jnp.where(differ < 2 * size, dot(keys, queries, NT), found)
      of_q = jnp.where(level & (row > column), d_scores, 0)
      of_k = jnp.where(level & (row < column), d_scores_t, 0)
      of_q = times(tiles(dot(of_q, keys)), before)
      of_k = times(tiles(dot(of_k, queries)), after)
      adjoint.descend(size, q * of_q, k * of_k)
      d_q, d_k = d_q + of_q, d_k + of_k
      continue
    q_half, k_half = halves(q, size)[1], halves(k, size)[0]
    before, after = halves(before, size)[1], halves(after, size)[0]
    queries, keys = q_half * before, k_half * after
    both_queries, both_keys = (flat(join(x, x)) for x in (queries, keys))
    scored = dot(flat(keys), both_queries, NT)
    found = _place(scored, found, differ, size, 0)

    def part(matrix, half, level=level, size=size):
      kept = jnp.where(level, matrix, 0)
      return _row_halves(kept, size)[half].reshape(-1, CHUNK)

    of_q = dot(part(d_scores, 1), both_keys).reshape(queries.shape) * before
    of_k = dot(part(d_scores_t, 0), both_queries).reshape(keys.shape) * after
    adjoint.descend(size, q_half * of_q, k_half * of_k)
    first, second = halves(d_q, size)
    d_q = join(first, second + of_q)
    first, second = halves(d_k, size)
    d_k = join(first + of_k, second)
  return d_q, d_k, _with_diagonal(found, row < column, q, k, inclusive)
