"""Query, key and value heads, with the short convolution some mixers add."""

from collections.abc import Sequence

import jax
from flax import nnx

from efficient_attn.layers.context import Context
from efficient_attn.layers.conv import ShortConv, convolve
from efficient_attn.layers.param import Projection


class QKV(nnx.Module):
  """Maps x [B, T, D] to query, key and value heads.

  Each of `query`, `key` and `value` is (number of heads, width of a head). With
  `conv_width` > 0 each passes through a short causal convolution and silu,
  whose last inputs (the tails) continue a sequence. `bias` is that of the
  projections.
  """

  def __init__(
    self,
    d_model: int,
    *,
    query: tuple[int, int],
    key: tuple[int, int],
    value: tuple[int, int],
    conv_width: int = 0,
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    shapes = (query, key, value)
    self.query, self.key, self.value = (
      Projection({'embed': d_model}, _axes(heads, dim), bias=bias, rngs=rngs)
      for heads, dim in shapes
    )
    if conv_width:
      self.convs = nnx.List(
        ShortConv(_axes(heads, dim), conv_width, rngs=rngs)
        for heads, dim in shapes
      )
    else:
      self.convs = None

  def __call__(
    self, x: jax.Array, context: Context | None = None, tails=None
  ) -> tuple[Sequence[jax.Array], tuple | None]:
    """Returns (query, key, value) and the tails (None without convolutions)."""
    heads = (self.query(x), self.key(x), self.value(x))
    if self.convs is None:
      return heads, None
    return convolve(self.convs, heads, context, tails)

  def init_tails(self, batch: int, dtype) -> tuple | None:
    """Returns the zero inputs before the first token."""
    if self.convs is None:
      return None
    return tuple(conv.init_state(batch, dtype) for conv in self.convs)


def _axes(heads: int, dim: int) -> dict[str, int]:
  """The axes of heads; one head alone is on every device."""
  return {'heads' if heads > 1 else 'one_head': heads, 'head_dim': dim}
