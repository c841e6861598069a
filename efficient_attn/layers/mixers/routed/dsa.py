"""DSA, DeepSeek sparse attention (DeepSeek-V3.2, 2512.02556).

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the top_k of I_t
  I_ts = sum_j w_tj relu(a_tj . b_s) / sqrt(J I),   (a, b, w) = W_I x

The indexer's queries a and its one key b, which is layer-normed, are rotated in
half of their channels. Its input is detached: it learns from the divergence of
its softmax over the chosen tokens from the weights of the attention, which is
added to the gradient of whatever loss the model has. (DeepSeek-V3.2 has MLA
below, whose latent gives a, and 64 index heads of 128 at a width of 7168.)
O(T top_k), and O(T^2) for the indexer. The cache holds every past key, value
and index key. In an encoder every token may be chosen.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn.layers.cache import positions_of, recall
from efficient_attn.layers.mixers.routed.heads import (
  GroupedHeads,
  attach,
  spans,
  token_op,
)
from efficient_attn.layers.norm import LayerNorm
from efficient_attn.layers.param import Projection
from efficient_attn.ops.positions import rotary
from efficient_attn.ops.routed.dsa import dsa_attention
from efficient_attn.values import Positive


class DSA(GroupedHeads):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  packing = left_padding = True

  def __init__(
    self,
    *,
    top_k: Positive = 2048,
    index_heads: Positive = 8,
    index_dim: Positive = 64,
    **options,
  ):
    super().__init__(**options)
    embed, rngs = {'embed': options['d_model']}, options['rngs']
    self.index_query = Projection(
      embed, {'index_heads': index_heads, 'index': index_dim}, rngs=rngs
    )
    self.index_key = Projection(embed, {'index': index_dim}, rngs=rngs)
    self.index_norm = LayerNorm(index_dim)
    self.index_weight = Projection(
      embed, {'index_heads': index_heads}, rngs=rngs
    )
    self.scale = (index_heads * index_dim) ** -0.5
    self.top_k = top_k

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    query, key, value = self.project(x, context, cache)
    index_query, index_key, weight = self.index(
      jax.lax.stop_gradient(x), context, cache
    )
    (key, value, index_key), after, offset = recall(
      context, cache, key=key, value=value, index=index_key
    )
    op = token_op(dsa_attention, 'BTJI', 'BSI', 'BTJ')
    o, loss = op(
      *(query, key, value, index_query, index_key, weight),
      top_k=self.top_k,
      causal=self.causal,
      **spans(context, cache, offset, x.shape[1]),
    )
    # The loss of every shard of heads: only its gradient matters.
    return attach(self.out(o), jnp.mean(loss, -1)), after

  def index(self, x, context, cache):
    """The indexer's queries, keys and weights."""
    rotate = functools.partial(
      rotary,
      positions=positions_of(context, cache and cache.cursor, x.shape[1]),
      base=self.rotary_base,
      fraction=0.5,
    )
    key = self.index_norm(self.index_key(x))
    return (
      rotate(self.index_query(x)),
      rotate(key[:, :, None])[:, :, 0],
      self.index_weight(x) * self.scale,
    )

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    index = self.index_norm.scale.shape
    return super().init_cache(batch, max_len, dtype, index=index)
