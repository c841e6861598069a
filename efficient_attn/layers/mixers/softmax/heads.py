"""The sizes of an attention layer, handed to its parts."""

from typing import NamedTuple


class Heads(NamedTuple):
  """Sizes of an attention layer.

  Attributes:
    d_model: width of the model.
    query: number of query heads.
    kv: number of key and value heads, a divisor of it.
    dim: width of a head.
    causal: whether a token sees none after it.
  """

  d_model: int
  query: int
  kv: int
  dim: int
  causal: bool
