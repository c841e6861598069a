"""Clustered attention (Vyas et al. 2007.04825), for encoders.

  o_i = softmax(q^c K^T / sqrt(H)) V,   q^c the mean query of i's cluster

and, with `top_k` > 0, improved: every query weighs the `top_k` keys that its
cluster weighs most by itself, within the weight that the cluster gives them
together; see `ops.routed.clustered_attention`. The clusters are those of
Lloyd's algorithm on `num_bits` signs of random projections, drawn from `seed`
once. O(T num_clusters + T top_k).
"""

import functools

import jax

from efficient_attn import sharding
from efficient_attn.layers.mixer import WholeMixer
from efficient_attn.layers.mixers.routed.heads import GroupedHeads
from efficient_attn.ops.routed.clustered_attention import (
  clustered_attention,
  hamming_clusters,
)
from efficient_attn.values import Positive, Seed


class Clustered(WholeMixer, GroupedHeads):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    num_clusters: Positive = 100,
    top_k: Positive = 32,
    num_bits: Positive = 63,
    iterations: Positive = 10,
    seed: Seed = 0,
    **options,
  ):
    super().__init__(**options)
    self.num_clusters = num_clusters
    self.top_k = top_k
    self.num_bits = num_bits
    self.iterations = iterations
    self.seed = seed

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""
    number = min(self.num_clusters, x.shape[1])
    find = functools.partial(
      hamming_clusters, num_clusters=number, iterations=self.iterations
    )

    def op(query, key, value, projections):
      clusters = find(jax.lax.stop_gradient(query), projections)
      return clustered_attention(
        query, key, value, clusters, num_clusters=number, top_k=self.top_k
      )

    shape = (*self.heads, self.num_bits)
    projections = jax.random.normal(jax.random.key(self.seed), shape)
    op = sharding.local_op(op, ('BTNH', 'BTKH', 'BTKV', 'N__'), 'BTNV')
    heads = self.project(x, context, None)
    return self.out(op(*heads, projections))
