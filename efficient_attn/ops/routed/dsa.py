"""DeepSeek sparse attention, DSA (DeepSeek-V3.2, 2512.02556).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the top_k of I_t
    I_ts = sum_j w_tj relu(a_tj . b_s)

a lightning indexer of a few small heads j with one key b_s for all chooses the
tokens that every head of the attention sees. O(T top_k H) for the attention,
O(T^2) of the small heads for the scores; memory O(T). The second result is the
loss from which the indexer learns, see `selected_tokens`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import chunks
from efficient_attn.ops.products import product
from efficient_attn.ops.routed.selected_tokens import token_attention


def index_scores(
  query: Float[Array, 'B T J I'],
  key: Float[Array, 'B S I'],
  weights: Float[Array, 'B T J'],
) -> Float[Array, 'B T S']:
  """I_ts of the module docstring."""
  each = product('btji,bsi->btjs', query, key)
  return product('btjs,btj->bts', jax.nn.relu(each), weights)


def dsa_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  index_query: Float[Array, 'B T J I'],
  index_key: Float[Array, 'B S I'],
  index_weights: Float[Array, 'B T J'],
  *,
  top_k: int,
  causal: bool = True,
  offset: int | Int[Array, ''] = 0,
  segment_ids: Int[Array, 'B S'] | None = None,
  starts: Int[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T 1']]:
  """Attention to the tokens that the indexer scores highest.

  Args:
    query: queries, of the tokens from `offset` on.
    key: keys.
    value: values.
    index_query: the indexer's queries a.
    index_key: its keys b.
    index_weights: its weights w, with the scale of the products.
    top_k: tokens of a query.
    causal: whether later tokens are hidden.
    offset: the index of the first query among the keys.
    segment_ids: of all tokens, where T = S; a segment ends where the id
      changes, and segments do not see each other.
    starts: the first key that each query may see.

  Returns:
    The output, in the query's dtype, and the loss of the indexer,
    [B, T, 1].
  """
  B, T = query.shape[:2]
  if segment_ids is not None:
    segment_ids = chunks.segment_counts(segment_ids)
  place = jnp.broadcast_to(offset + jnp.arange(T), (B, T))

  def score(marks):
    index_query, index_weights, *where = marks
    scores = index_scores(index_query, index_key, index_weights)
    seen = visible(*where, causal, key.shape[1], segment_ids)
    return jnp.where(seen, scores, -jnp.inf)[:, None]

  marks = index_query, index_weights, place, starts, segment_ids
  return token_attention(query, key, value, score, marks, top_k=top_k)


def visible(place, start, segment, causal, length, segment_ids):
  """Which of `length` keys queries at `place` [B, C] of `segment` may see."""
  index = jnp.arange(length)
  seen = (index <= place[..., None]) | (not causal)
  if start is not None:
    seen &= index >= start[..., None]
  if segment_ids is not None:
    seen &= segment[..., None] == segment_ids[:, None]
  return seen
