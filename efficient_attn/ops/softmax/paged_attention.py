"""PagedAttention: keys and values in pages, found through a table.

    k_s = key_pages[block_table[b, s // page], s % page]

(Kwon et al., https://arxiv.org/abs/2309.06180.) The pages of a sequence lie
anywhere in a pool and sequences may share them, as those with one prompt do.
The definition is a gather and a masked attention: O(T M page) time, and as much
memory for the gathered keys, which the kernel of TPUs reads in place.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import dispatch, masks
from efficient_attn.ops.shapes import Shaped
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.ops.softmax.attention_decode import PAGED, attend_pages


def paged_attention(
  query: Float[Array, 'B T N H'],
  key_pages: Float[Array, 'P page K H'],
  value_pages: Float[Array, 'P page K V'],
  block_table: Int[Array, 'B M'],
  lengths: Int[Array, 'B'],
  *,
  scale: float | None = None,
  logits_soft_cap: float | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Float[Array, 'B T N V']:
  """Causal attention of the last T tokens of each sequence.

  Args:
    query: queries; query t stands at position lengths[b] - T + t.
    key_pages: the pool of keys.
    value_pages: the pool of values.
    block_table: the pages of each sequence in order. What stands behind the
      last page in use, and in a page behind the last token, does not matter.
    lengths: how many tokens each sequence has, the queries included.
    scale: factor of the logits, H**-0.5 by default.
    logits_soft_cap: c in c tanh(logits / c).
    implementation: the name of a kernel, or 'xla' for the definition; see
      `dispatch.choose`.

  Returns:
    The output; 0 for a query before the start of its sequence.
  """
  B, (P, page) = len(block_table), key_pages.shape[:2]
  if query.shape[0] != B or lengths.shape != (B,):
    raise ValueError(
      f'block_table of shape {block_table.shape} is for B = {B} sequences, but'
      f' query has shape {query.shape} and lengths {lengths.shape}; pass one'
      ' row of pages and one length per sequence.'
    )
  if value_pages.shape[:2] != (P, page):
    raise ValueError(
      f'value_pages has {value_pages.shape[:2]} pages and slots but key_pages'
      f' {(P, page)}; they must be equal.'
    )
  arrays = query, key_pages, value_pages, block_table, lengths
  options = dict(scale=scale, logits_soft_cap=logits_soft_cap)
  rows = dispatch.choose(
    PAGED,
    implementation,
    op='paged_attention',
    **_request(query, value_pages, logits_soft_cap),
  )
  if not rows:
    return _gather(*arrays, **options)
  return attend_pages(_gather, *arrays, rows=rows, **options)


def explain_paged_attention(
  query: Float[Shaped, 'B T N H'],
  value_pages: Float[Shaped, 'P page K V'],
  *,
  logits_soft_cap: float | None = None,
  implementation: str | Sequence[str] | None = None,
) -> str:
  """Says which implementation `paged_attention` takes on each platform.

  Takes arguments of `paged_attention`; shapes are enough.
  """
  return dispatch.explain(
    PAGED,
    implementation,
    op='paged_attention',
    **_request(query, value_pages, logits_soft_cap),
  )


def _request(query, value_pages, soft_cap) -> dict[str, Any]:
  return dict(query=query, pages=value_pages, soft_cap=soft_cap)


def _gather(query, key_pages, value_pages, block_table, lengths, **options):
  """The definition."""
  B, M = block_table.shape
  page = key_pages.shape[1]
  used = jnp.arange(M * page) < lengths[:, None]

  def gather(pages):
    found = pages.at[block_table].get(mode='clip')
    found = found.reshape(B, M * page, *pages.shape[2:])
    return jnp.where(used[:, :, None, None], found, 0)  # not even a NaN

  return attention(
    query,
    gather(key_pages),
    gather(value_pages),
    mask=masks.Causal(lengths - query.shape[1]),
    implementation=dispatch.XLA,
    **options,
  )
