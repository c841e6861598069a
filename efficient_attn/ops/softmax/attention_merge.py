"""Split-KV attention: pieces of the keys, attended apart and merged exactly.

    o = sum_j w_j o_j / sum_j w_j,   w_j = total_j e^(top_j - max_i top_i)

where piece j of the keys gave o_j and the denominator total_j e^top_j. A query
of a decoder is one row, so its keys are what there is to share out:
FlashDecoding (Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). O(T S) work in
`num_splits` independent pieces; `ops.attention` is the definition. A learned
sink is one more piece, of denominator e^sink_n and output 0.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention_with_stats
from efficient_attn.ops.softmax.stats import Stats, exp_below, largest


def merge_attention(
  outs: Float[Array, 'J *rows V'], stats: Stats
) -> tuple[Float[Array, '*rows V'], Stats]:
  """Joins the attention of disjoint pieces of the keys.

  Args:
    outs: the output of every piece.
    stats: their denominators, [J, *rows].

  Returns:
    The output, in the dtype of `outs`, and the denominator of all keys
    together.
  """
  empty = stats.total == 0
  tops = jnp.where(empty, -jnp.inf, stats.top)
  top = largest(jnp.moveaxis(tops, 0, -1))
  weights = stats.total * exp_below(lax.stop_gradient(tops), top)
  found = Stats(top, weights.sum(0))
  out = found.divide(jnp.sum(weights[..., None] * outs, 0))
  return out.astype(outs.dtype), found


def split_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  num_splits: int,
  lengths: Int[Array, 'B'] | None = None,
  mask: masks.Mask | None = None,
  scale: float | None = None,
  logits_soft_cap: float | None = None,
) -> tuple[Float[Array, 'B T N V'], Stats]:
  """Attention of few queries over many keys, in pieces of equal length.

  Args:
    query: queries.
    key: keys.
    value: values.
    num_splits: pieces, at most S; the last is padded.
    lengths: how many keys of each sequence there are, S by default.
    mask: an expression of `ops.masks`, beside `lengths`.
    scale: factor of the logits, H**-0.5 by default.
    logits_soft_cap: c in c tanh(logits / c).

  Returns:
    The output and its denominator.
  """
  T, S = query.shape[1], key.shape[1]
  if not 1 <= num_splits <= S:
    raise ValueError(
      f'num_splits = {num_splits} must be between 1 and the S = {S} keys.'
    )
  width = -(-S // num_splits)
  num_splits = -(-S // width)  # a piece of nothing but padding is left out
  pad = num_splits * width - S
  admitted = jnp.ones((1, 1, T, S), bool) if mask is None else mask.dense(T, S)
  if lengths is not None:
    admitted &= jnp.arange(S) < lengths[:, None, None, None]

  def pieces(x, axis):
    widths = [(0, pad if i == axis else 0) for i in range(x.ndim)]
    shape = x.shape[:axis] + (num_splits, width) + x.shape[axis + 1 :]
    return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)

  def piece(key, value, admitted):
    return attention_with_stats(
      query,
      key,
      value,
      mask=masks.Dense(admitted),
      scale=scale,
      logits_soft_cap=logits_soft_cap,
      implementation='reference',
    )

  parts = pieces(key, 1), pieces(value, 1), pieces(admitted, 3)
  return merge_attention(*jax.vmap(piece)(*parts))
