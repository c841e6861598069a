"""One head of a chunk with a gate per channel: what it reads and writes.

A recurrence of matrices reads the state with one or two sets of queries, before
or after the gate of their token, and writes to it with one or two sets of keys.
The decays between them are a tree, see `decay_tree`.
"""

import jax.numpy as jnp

from efficient_attn.kernels import decay_tree
from efficient_attn.kernels.decay_tree import flat, tiles
from efficient_attn.kernels.layout import CHUNK


class GatedHead:
  """Queries and keys, in tiles, with the decays from the one to the other.

  Args:
    queries: one or two arrays [C / 8, 8, H].
    keys: the same.
    gate: logarithms of the decays, [C, H].
    gated: of each query, whether it reads after the gate of its token.
    inclusive: whether the first of them also reads what its token writes.

  Attributes:
    total: the decay of the chunk, [1, H].
  """

  def __init__(self, queries, keys, gate, *, gated, inclusive):
    decay = jnp.exp(gate)
    self._levels, self.total = decay_tree.build(decay)
    self._decay = tiles(decay)
    self._gated = gated
    self.queries = [
      q * self._decay if x else q for q, x in zip(queries, gated, strict=True)
    ]
    self.keys = keys
    self._own = [queries[0] if inclusive else None, None][: len(queries)]

  def reads(self, *which):
    """Queries of the state before the chunk, below each other; None for all."""
    before, _ = self._levels[CHUNK]
    queries = [self.queries[i] for i in which] if which else self.queries
    return _stacked([flat(q * before) for q in queries])

  def writes(self):
    """Keys of the state after the chunk, below each other."""
    _, after = self._levels[CHUNK]
    return _stacked([flat(k * after) for k in self.keys])

  def scores(self, dot):
    """See `decay_tree.scores`."""
    return decay_tree.scores(
      self.queries, self.keys, self._levels, dot, self._own
    )

  def turned_scores(self, dot):
    """Their transposes."""
    return decay_tree.turned_scores(
      self.queries, self.keys, self._levels, dot, self._own
    )

  def pull(self, d_scores, d_scores_t, d_reads, d_writes, d_total, own, dot):
    """Takes cotangents back to the queries, the keys and the gate.

    Args:
      d_scores: that of `scores`, [queries * C, keys * C]; its diagonals are
        not read.
      d_scores_t: its transpose.
      d_reads: that of `reads()`.
      d_writes: that of `writes()`.
      d_total: that of the logarithm of the total, [1, H].
      own: those of the diagonal of the first query, [C, 1] for each key.
      dot: a matrix product.

    Returns:
      Lists of the cotangents of queries and keys, [C / 8, 8, H], that of the
      gate, [C, H], and what `turned_scores` returns.
    """
    before, after = self._levels[CHUNK]
    d_queries = [tiles(x) * before for x in _apart(d_reads)]
    d_keys = [tiles(x) * after for x in _apart(d_writes)]
    adjoint = decay_tree.Adjoint(
      _products(self.queries, d_queries),
      _products(self.keys, d_keys),
      jnp.broadcast_to(d_total, (decay_tree.TILE, d_total.shape[-1])),
    )
    d_queries, d_keys, scores = decay_tree.pull(
      self.queries,
      self.keys,
      self._levels,
      _blocks(d_scores),
      [list(x) for x in zip(*_blocks(d_scores_t), strict=True)],
      adjoint,
      dot,
      d_queries,
      d_keys,
      self._own,
    )
    d_gate = tiles(adjoint.gate())
    for i, gated in enumerate(self._gated):
      if gated:
        d_gate += self.queries[i] * d_queries[i]
        d_queries[i] = self._decay * d_queries[i]
    if self._own[0] is not None:
      own = [tiles(x) for x in own]
      d_queries[0] += _products(self.keys, own)
      d_keys = [d + x * self._own[0] for d, x in zip(d_keys, own, strict=True)]
    return d_queries, d_keys, flat(d_gate), scores


def _products(xs, ys):
  return sum(x * y for x, y in zip(xs, ys, strict=True))


def _stacked(arrays):
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _apart(x):
  return [x[i : i + CHUNK] for i in range(0, x.shape[0], CHUNK)]


def _blocks(x):
  """[rows * C, columns * C] to lists of rows of [C, C]."""
  return [
    [rows[:, j : j + CHUNK] for j in range(0, x.shape[1], CHUNK)]
    for rows in _apart(x)
  ]
