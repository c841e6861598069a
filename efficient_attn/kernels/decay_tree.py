"""Decays of all spans of a chunk under channel gates, as a binary tree.

A pair of tokens i > j is of the level s, the highest bit in which i and j
differ: they stand in the second and the first half of one block of 2 s tokens,
and the decay of the tokens between them is what follows j in its half times
what precedes i in the other,

  a_(j, i) = before_s[i] after_s[j];

a query that comes after the gate of its token has that among its factors.

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


def build(decay):
  """The tree of decays.

  Args:
    decay: of every token, [C, H], in [0, 1].

  Returns:
    levels: block size -> (before, after), [C / 8, 8, H], or None for ones;
      the size C stands for the whole chunk.
    total: the decay of the chunk, [1, H].
  """
  total = tiles(decay)
  before = after = None
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


def scores(queries, keys, levels, dot, own):
  """sum_h q_ih k_jh a_h(j, i) for j < i, and own_i . k_i, of each q and k.

  Args:
    queries: list of q, [C / 8, 8, H], which share the decays.
    keys: list of k, [C / 8, 8, H].
    levels: of `build`.
    dot: a matrix product.
    own: with what each q reads its own token, or None.

  Returns:
    For each q a list over the keys, of [C, C].
  """
  differ = iota(0) ^ iota(1)
  found = [[None] * len(keys) for _ in queries]
  for size in LEVELS:
    rows, columns = _decayed(queries, keys, levels, size)
    rows = _stacked([flat(q) for q in rows])
    level = dot(rows, _beside(columns, size, 0), NT)
    for of_q, part in zip(found, _split(level, len(queries)), strict=True):
      for j, x in enumerate(_apart(part, len(keys), size, 0)):
        if size < TILE:
          of_q[j] = jnp.where(differ < 2 * size, x, of_q[j])
        else:
          of_q[j] = _place(x, of_q[j], differ, size, 1)
  return _finished(found, iota(0) > iota(1), keys, own)


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


def _finished(found, strictly, keys, own):
  """Scores with their diagonals, of which `found` has nothing."""
  return [
    [_with_diagonal(x, strictly, q, k) for x, k in zip(of_q, keys, strict=True)]
    for of_q, q in zip(found, own, strict=True)
  ]


def _with_diagonal(found, strictly, q, k):
  if q is None:
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

  def gate(self):
    """The gradient of the logarithms of the decays, [C, H]."""
    return flat(self.total)


def _tile_sums(x):
  """[blocks, tiles, 8, H] to sums of blocks, in all rows of [blocks, 8, H]."""
  x = jnp.sum(x, 1)
  for shift in (4, 2, 1):
    x = x + pltpu.roll(x, shift, 1)
  return x


def turned_scores(queries, keys, levels, dot, own):
  """The transposes of `scores`, [key, query]."""
  found = [[None] * len(keys) for _ in queries]
  for size in LEVELS:
    rows, columns = _decayed(queries, keys, levels, size)
    found = _turned_level(rows, columns, found, dot, size)
  return _finished(found, iota(0) < iota(1), keys, own)


def _decayed(queries, keys, levels, size):
  """Queries up to their half and keys from theirs, of the tokens that meet."""
  before, after = levels[size]
  if size < TILE:
    return [times(q, before) for q in queries], [times(k, after) for k in keys]
  before, after = halves(before, size)[1], halves(after, size)[0]
  return [halves(q, size)[1] * before for q in queries], [
    halves(k, size)[0] * after for k in keys
  ]


def _beside(arrays, size, half):
  """One or two arrays of tokens of a half, as the columns of scores.

  From the size of a tile on, the columns of the other half are free: they are
  those of the second array, or the same, so that the first keeps its places.
  """
  if size < TILE:
    return _stacked([flat(x) for x in arrays])
  pair = arrays[0], arrays[-1]
  return flat(join(*(pair[::-1] if half else pair)))


def _apart(scores, count, size, half):
  """The scores of the arrays of `_beside`, [rows, C] each, where they stand."""
  if count == 1:
    return [scores]
  if size < TILE:
    return [scores[:, :CHUNK], scores[:, CHUNK:]]
  return [scores, pltpu.roll(scores, size if half else CHUNK - size, 1)]


def _together(parts, size, half):
  """The inverse, of scores that are zero but in the columns of the half."""
  if len(parts) == 1:
    return parts[0]
  if size < TILE:
    return jnp.concatenate(parts, 1)
  first, second = parts
  return first + pltpu.roll(second, CHUNK - size if half else size, 1)


def _turned_level(rows, keys, found, dot, size):
  """Puts the transposed scores of a level over those of the levels above."""
  differ = iota(0) ^ iota(1)
  level = dot(_stacked([flat(k) for k in keys]), _beside(rows, size, 1), NT)
  level = [_apart(x, len(rows), size, 1) for x in _split(level, len(keys))]
  return [
    [
      jnp.where(differ < 2 * size, x[i], above)
      if size < TILE
      else _place(x[i], above, differ, size, 0)
      for x, above in zip(level, of_q, strict=True)
    ]
    for i, of_q in enumerate(found)
  ]


def pull(
  queries,
  keys,
  levels,
  d_scores,
  d_scores_t,
  adjoint,
  dot,
  d_queries,
  d_keys,
  own,
):
  """Takes the cotangents of `scores` back to the queries, keys and the gate.

  Args:
    queries: as in `scores`.
    keys: as in `scores`.
    levels: of `build`.
    d_scores: as `scores` returns them.
    d_scores_t: their transposes.
    adjoint: of the whole chunk, is taken down to single tokens.
    dot: a matrix product.
    d_queries: what the whole chunk gives, [C / 8, 8, H] for each q.
    d_keys: the same of the keys.
    own: as in `scores`.

  Returns:
    d_queries and d_keys without the diagonal, and what `turned_scores` returns.
  """
  row, column = iota(0), iota(1)
  differ = row ^ column
  found = [[None] * len(keys) for _ in queries]
  for size in LEVELS:
    before, after = levels[size]
    level = (differ >= size) & (differ < 2 * size)
    rows, columns = _decayed(queries, keys, levels, size)
    found = _turned_level(rows, columns, found, dot, size)
    small = size < TILE
    if small:
      own_q, own_k = queries, keys
    else:
      before, after = halves(before, size)[1], halves(after, size)[0]
      own_q = [halves(q, size)[1] for q in queries]
      own_k = [halves(k, size)[0] for k in keys]

    def part(matrix, half, level=level, size=size, small=small):
      if small:
        side = row > column if half else row < column
        return jnp.where(level & side, matrix, 0)
      kept = jnp.where(level, matrix, 0)
      return _row_halves(kept, size)[half].reshape(-1, CHUNK)

    of_q = dot(
      _stacked(
        [_together([part(x, 1) for x in of_q], size, 0) for of_q in d_scores]
      ),
      _beside(columns, size, 0),
    )
    of_k = dot(
      _stacked(
        [
          _together([part(x, 0) for x in of_k], size, 1)
          for of_k in zip(*d_scores_t, strict=True)
        ]
      ),
      _beside(rows, size, 1),
    )
    of_q = [
      times(x.reshape(q.shape), before)
      for x, q in zip(_split(of_q, len(queries)), own_q, strict=True)
    ]
    of_k = [
      times(x.reshape(k.shape), after)
      for x, k in zip(_split(of_k, len(keys)), own_k, strict=True)
    ]
    adjoint.descend(
      size,
      sum(q * x for q, x in zip(own_q, of_q, strict=True)),
      sum(k * x for k, x in zip(own_k, of_k, strict=True)),
    )
    d_queries = [
      _added(d, x, size, 1) for d, x in zip(d_queries, of_q, strict=True)
    ]
    d_keys = [_added(d, x, size, 0) for d, x in zip(d_keys, of_k, strict=True)]
  return d_queries, d_keys, _finished(found, row < column, keys, own)


def _stacked(arrays):
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _split(x, count):
  """The inverse of `_stacked`."""
  return x.reshape(count, -1, x.shape[-1]) if count > 1 else [x]


def _added(x, part, size, half):
  """Adds `part` to the first or to the second halves of blocks, or to all."""
  if size < TILE:
    return x + part
  both = list(halves(x, size))
  both[half] = both[half] + part
  return join(*both)
