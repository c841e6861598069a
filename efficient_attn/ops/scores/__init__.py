"""Score modifiers: what is added to the scaled logits before the softmax.

The counterpart of `masks` for additive terms. An expression is evaluated one
tile at a time, so ALiBi or a forget-gate bias never exists as a [T, S] array,
and every float leaf is differentiable. Expressions add up with `+`.

    Alibi(slopes)   -slope_n |query - key|      (Press et al. 2022)
    T5(table)       table_n by the bucket of key - query  (Raffel et al. 2020)
    Diagonal(table)  table_n by key - query, up to a distance
    Swin(table, grid)  table_n by the offset in a grid    (Liu et al. 2021)
    SoftSpan(span)  log of a ramp that ends a learned span (Sukhbaatar et al.)
    Forget(gates)   sum of log f over (key, query]  (Lin et al. 2025)
    Dense(array)    array, broadcastable to [B, N, T, S]
    Except(score, tokens)  score, but nothing from or to some tokens

A new modifier is one more dataclass with `tile`, or, of the distance of query
and key, with `Relative.by_distance`.
"""

from efficient_attn.ops.scores.arrays import Dense, Except, Swin
from efficient_attn.ops.scores.base import Score, Sum
from efficient_attn.ops.scores.distance import (
  T5,
  Alibi,
  Diagonal,
  Relative,
  SoftSpan,
  alibi_slopes,
)
from efficient_attn.ops.scores.forget import Forget

__all__ = [
  'T5',
  'Alibi',
  'Dense',
  'Diagonal',
  'Except',
  'Forget',
  'Relative',
  'Score',
  'SoftSpan',
  'Sum',
  'Swin',
  'alibi_slopes',
]
