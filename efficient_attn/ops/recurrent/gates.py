"""Gates of the linear family: log decays, and products of them over spans.

With log decays g_t <= 0 every form needs the decay of a span,
exp(sum of g over it). Differences of one long cumulative sum cancel: after a
hard gate (g = -1000) what remains of a float32 sum is wrong in the third
digit. Here a span is always a *plain sum* of its own gates, so there is no
cancellation, no exponent is ever positive, hard gates need no special case,
and nothing depends on a later token.

The causal triangle of a chunk is tiled by squares: for m = 1, 2, 4, ... the
rows of every odd block of m tokens against the columns of the block before
it. In such a square the span (j, i] splits at the block boundary into what
follows j in its block and what precedes i in its own, so that

  sum_h q_ih k_jh exp(span_ijh) = (q_i exp(before_i)) . (k_j exp(after_j))

is a matrix product. A chunk of C tokens costs C log2(C) exponentials per
channel, where exact pairwise differences would cost C^2.

The sums come from doubling the blocks, few additions on many small arrays; or,
`wide`, from products with matrices of zeros and ones, which a matrix unit has
for nothing and which leave every array in rows of C tokens. Both are sums of
the same gates.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from efficient_attn.ops import shapes
from efficient_attn.ops.products import product


def log_decay_floor(dtype: jnp.dtype) -> float:
  """The log decay below which exp is exactly zero in `dtype`."""
  return float(np.log(jnp.finfo(dtype).smallest_subnormal)) - 1.0


def floored(gate: Array) -> Array:
  """Raises values whose decay is zero to the floor of the dtype.

  The decay does not change, and -inf stays out of sums.
  """
  return jnp.maximum(gate, log_decay_floor(gate.dtype))


def expand_log_decay(
  log_decay: Array | None,
  sizes: tuple[int, int, int, int],
  dtype: jnp.dtype,
  *,
  floor: bool = True,
) -> Array | None:
  """Brings every kind of gate of `sizes` B, T, N, H to [B|1, T, N, H|1].

  The shape says the kind: [N] constant per head, [B, T, N] scalar per token,
  [B, T, N, H] per channel. With `floor` see `floored`.
  """
  if log_decay is None:
    return None
  batch, length, heads, channels = sizes
  kinds = {
    1: ('[N]', (heads,)),
    3: ('[B, T, N]', (batch, length, heads)),
    4: ('[B, T, N, H]', (batch, length, heads, channels)),
  }
  name, shape = kinds.get(log_decay.ndim, (None, None))
  if log_decay.shape != shape:
    wanted = ', '.join(f'{n} = {s}' for n, s in kinds.values())
    raise ValueError(
      f'log_decay has shape {log_decay.shape}, which is no kind of gate: '
      f'pass one of {wanted}, with N the heads of v.'
    )
  shapes.check_log_decay(log_decay)
  gate = log_decay.astype(dtype)
  if floor:
    gate = floored(gate)
  if name == '[N]':
    gate = jnp.broadcast_to(gate, (1, length, heads))
  return gate if gate.ndim == 4 else gate[..., None]


def block_sums(
  gate: Float[Array, '*batch C h'], *, inclusive: bool = True
) -> Iterator[tuple[Array, Array]]:
  """Sums of the gates before and after each row, in blocks of 1, 2, ..., C.

  Args:
    gate: log decays of one chunk; C is a power of two.
    inclusive: whether `before` counts the gate of the row itself.

  Yields:
    before: [*batch, C/m, m, h], from the start of the block to the row.
    after: [*batch, C/m, m, h], past the row to the end of the block.
  """
  total = gate[..., None, :]
  before = total if inclusive else jnp.zeros_like(total)
  after = jnp.zeros_like(total)
  yield before, after
  while total.shape[-3] > 1:
    first, second = halves(total)
    # Adding zeros to the other half is faster than joining the halves.
    before = _add_to_pairs(before, jnp.zeros_like(first), first)
    after = _add_to_pairs(after, second, jnp.zeros_like(second))
    total = first + second
    yield before, after


def _add_to_pairs(blocks, first, second):
  """Adds to the halves of each pair, [.., 2n, m, h] to [.., n, 2 m, h]."""
  *lead, count, size, channels = blocks.shape
  pairs = blocks.reshape(*lead, count // 2, 2, size, channels)
  pairs = pairs + jnp.stack([first, second], axis=-3)
  return pairs.reshape(*lead, count // 2, 2 * size, channels)


def halves(blocks: Array) -> tuple[Array, Array]:
  """The even and the odd blocks of [*batch, blocks, m, h]."""
  pairs = blocks.reshape(*blocks.shape[:-3], -1, 2, *blocks.shape[-2:])
  # A split, whose transpose is one concatenation, not two padded additions.
  even, odd = jnp.split(pairs, 2, axis=-3)
  return even[..., 0, :, :], odd[..., 0, :, :]


def merge(triangles: Array, square: Array) -> Array:
  """Lower triangles [.., 2n, m, m] and squares [.., n, m, m] to [.., n, 2m]."""
  first, second = halves(triangles)
  top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
  bottom = jnp.concatenate([square, second], -1)
  return jnp.concatenate([top, bottom], -2)


def added(spec: str, *operands: Array | np.ndarray) -> Array:
  """An einsum of gates with zeros and ones: their plain sums."""
  return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)


def edge_sums(
  gate: Float[Array, '*batch C h'], *, inclusive: bool = True
) -> tuple[Array, Array]:
  """Sums of the gates before and after each row of a chunk, by products.

  Returns:
    before: [*batch, C, h], from the start of the chunk to the row.
    after: [*batch, C, h], past the row to the end of the chunk.
  """
  size = gate.shape[-2]
  before = np.tri(size, k=0 if inclusive else -1, dtype=gate.dtype)
  after = np.tri(size, k=-1, dtype=gate.dtype).T
  return tuple(added('it,...th->...ih', m, gate) for m in (before, after))


class Levels(NamedTuple):
  """The pairs of tokens in an odd block of m and the one before, for every m.

  Attributes:
    odd: [L, C, 1], whether a row stands in an odd block.
    pairs: [L, C, C], the pairs of a row in an odd block and a column in the
      even block before it. Every pair j < i has one level.
    sums: [L, *batch, C, h], the gates between a row and the boundary of its
      two blocks: those before odd rows, those after even rows.
  """

  odd: np.ndarray
  pairs: np.ndarray
  sums: Array


def levels(
  gate: Float[Array, '*batch C h'], *, inclusive: bool = True
) -> Levels:
  """Tiles the pairs of a chunk, for m = 1, 2, ..., C / 2."""
  size = gate.shape[-2]
  row, column = np.arange(size)[:, None], np.arange(size)
  block = 2 ** np.arange(size.bit_length() - 1)[:, None, None]
  odd = row // block % 2 == 1
  before = column <= row if inclusive else column < row
  rows = row // block == column // block
  rows &= np.where(odd, before, column > row)
  sums = added('lit,...th->l...ih', rows.astype(gate.dtype), gate)
  return Levels(odd, odd & (row // block == column // block + 1), sums)


def span_sums(
  gate: Float[Array, '*batch C'],
  *,
  inclusive: bool = True,
  wide: bool = False,
) -> tuple[Array, Array, Array]:
  """Sums of scalar gates over all spans of a chunk.

  Args:
    gate: log decays of one chunk; C is a power of two.
    inclusive: whether the gate of the row itself counts.
    wide: whether sums are products.

  Returns:
    spans: [*batch, C, C], the gates of (j, i] (of (j, i) when not
      inclusive), zero on and above the diagonal.
    before: [*batch, C], from the start of the chunk to the row.
    after: [*batch, C], past the row to the end of the chunk.
  """
  if wide:
    size = gate.shape[-1]
    upto = np.tri(size, k=0 if inclusive else -1, dtype=gate.dtype)
    past = np.tri(size, k=-1, dtype=gate.dtype)
    spans = added('...it,tj->...ij', upto * gate[..., None, :], past)
    before, after = edge_sums(gate[..., None], inclusive=inclusive)
    return spans, before[..., 0], after[..., 0]
  spans = jnp.zeros_like(gate)[..., None, None]
  for before, after in block_sums(gate[..., None], inclusive=inclusive):
    if before.shape[-3] > 1:
      rows, columns = halves(before)[1], halves(after)[0]
      spans = merge(spans, rows + jnp.swapaxes(columns, -1, -2))
  return spans[..., 0, :, :], before[..., 0, :, 0], after[..., 0, :, 0]


def decayed_scores(
  q: Float[Array, '*#batch C H'],
  k: Float[Array, '*#batch C H'],
  gate: Float[Array, '*batch C H'],
  *,
  inclusive: bool = True,
  operand: jnp.dtype | None = None,
  wide: bool = False,
) -> tuple[Array, Array, Array]:
  """Scores of a chunk under channel gates, without a [C, C, H] array.

  Args:
    q: queries, broadcast against the gates.
    k: keys, broadcast against the gates.
    gate: log decays; C is a power of two.
    inclusive: whether the gate of the query's own token counts.
    operand: dtype of the operands of matrix products (default: as computed).
    wide: whether sums are products.

  Returns:
    scores: [*batch, C, C], sum_h q_ih k_jh exp(sum of g_h over (j, i]) for
      j <= i (over (j, i) and for j < i when not inclusive), else zero.
    before: [*batch, C, H], from the start of the chunk to the row.
    after: [*batch, C, H], past the row to the end of the chunk.
  """
  q, k = (x.astype(gate.dtype) for x in (q, k))
  operand = operand or gate.dtype
  if wide:
    tiles = levels(gate, inclusive=inclusive)
    scores = level_scores(q, k, tiles, inclusive=inclusive, operand=operand)
    return scores, *edge_sums(gate, inclusive=inclusive)
  ones = jnp.ones_like if inclusive else jnp.zeros_like
  scores = jnp.sum(q * k, -1) * ones(gate[..., 0])
  scores = scores[..., None, None]
  for before, after in block_sums(gate, inclusive=inclusive):
    blocks, size = before.shape[-3:-1]
    if blocks > 1:
      rows = halves(_blocks(q, size))[1] * jnp.exp(halves(before)[1])
      columns = halves(_blocks(k, size))[0] * jnp.exp(halves(after)[0])
      square = dot_rows(
        rows.astype(operand), columns.astype(operand), gate.dtype
      )
      scores = merge(scores, square)
  return scores[..., 0, :, :], before[..., 0, :, :], after[..., 0, :, :]


def level_scores(
  q: Float[Array, '*#batch C H'],
  k: Float[Array, '*#batch C H'],
  tiles: Levels,
  *,
  inclusive: bool,
  operand: jnp.dtype,
) -> Float[Array, '*batch C C']:
  """The scores of `decayed_scores` from the levels of its gate."""
  dtype = tiles.sums.dtype
  lead = (1,) * (tiles.sums.ndim - 3)

  def aligned(x):
    return x.reshape(x.shape[0], *lead, *x.shape[1:])

  # Odd rows ask, even rows answer: one array holds both.
  both = jnp.where(aligned(tiles.odd), q, k) * jnp.exp(tiles.sums)
  both = both.astype(operand)
  squares = dot_rows(both, both, dtype)
  scores = jnp.sum(jnp.where(aligned(tiles.pairs), squares, 0), 0)
  if not inclusive:
    return scores
  own = jnp.sum(q * k, -1)[..., None]
  return scores + jnp.where(np.eye(q.shape[-2], dtype=bool), own, 0)


def total(gate: Array, after: Array) -> Array:
  """The gates of a whole chunk: the first one and all after it."""
  return gate[..., 0, :] + after[..., 0, :]


class ChunkDecay:
  """The decays of one chunk, for any kind of gate.

  Args:
    gate: [*batch, C, H] per channel, [*batch, C, 1] scalar, or None.
    operand: dtype of the operands of matrix products.
    dtype: of everything else.
    wide: whether sums are products.
  """

  def __init__(
    self, gate, *, operand: jnp.dtype, dtype: jnp.dtype, wide: bool = False
  ):
    self.gate, self.operand, self.dtype = gate, operand, dtype
    self.wide = wide
    self._sums, self._levels = {}, {}

  def scores(self, q: Array, k: Array, *, inclusive: bool = True) -> Array:
    """sum_h q_ih k_jh exp(sum of gates over (j, i]), [*batch, C, C].

    Over (j, i) when not inclusive. Above the diagonal (and on it when not
    inclusive) values have no meaning and must be masked.
    """
    if self.gate is not None and self.gate.shape[-1] > 1:
      if self.wide:
        return level_scores(
          q.astype(self.dtype),
          k.astype(self.dtype),
          self._tiles(inclusive),
          inclusive=inclusive,
          operand=self.operand,
        )
      scores, *self._sums[inclusive] = decayed_scores(
        q, k, self.gate, inclusive=inclusive, operand=self.operand
      )
      return scores
    scores = _products(
      q.astype(self.operand), k.astype(self.operand), self.dtype
    )
    if self.gate is None:
      return scores
    spans, before, after = span_sums(
      self.gate[..., 0], inclusive=inclusive, wide=self.wide
    )
    self._sums[inclusive] = before[..., None], after[..., None]
    return scores * jnp.exp(spans)

  def before(self, *, inclusive: bool = True) -> Array:
    """The decay from the start of the chunk to each token, [*batch, C, H|1]."""
    return self._decays(inclusive)[0]

  def after(self) -> Array:
    """The decay past each token to the end of the chunk, [*batch, C, H|1]."""
    return self._decays(True)[1]

  def total(self) -> Array:
    """The decay over the chunk as a factor of states, [*batch, H|1, 1]."""
    return self.before()[..., -1, :, None]

  def _decays(self, inclusive):
    if self.gate is None:
      return (jnp.ones((1, 1), self.dtype),) * 2
    if inclusive not in self._sums and self.wide:
      self._sums[inclusive] = edge_sums(self.gate, inclusive=inclusive)
    if inclusive not in self._sums:  # no scores were asked for
      *_, (before, after) = block_sums(self.gate, inclusive=inclusive)
      self._sums[inclusive] = before[..., 0, :, :], after[..., 0, :, :]
    return tuple(map(jnp.exp, self._sums[inclusive]))

  def _tiles(self, inclusive):
    if inclusive not in self._levels:
      self._levels[inclusive] = levels(self.gate, inclusive=inclusive)
    return self._levels[inclusive]


def dot_rows(x: Array, y: Array, dtype: jnp.dtype) -> Array:
  """x_i . y_j, [*batch, C, C]."""
  return product('...ih,...jh->...ij', x, y, dtype=dtype)


def _products(q, k, dtype):
  """q_i . k_j, [*batch, C, C]; of a long chunk as two sums over half of H.

  Rows that are solved one from another add up what their products round off,
  and shorter sums round less.
  """
  if q.shape[-2] <= 256:
    return dot_rows(q, k, dtype)
  (q1, q2), (k1, k2) = (jnp.array_split(x, 2, -1) for x in (q, k))
  return dot_rows(q1, k1, dtype) + dot_rows(q2, k2, dtype)


def _blocks(x: Array, size: int) -> Array:
  """[*batch, C, H] to [*batch, C/size, size, H]."""
  return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])
