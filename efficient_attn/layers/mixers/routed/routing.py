"""Routing Transformer (Roy et al. 2003.05997): attention inside clusters.

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the cluster of t

with queries and keys layer-normed without weights and clustered by centroids mu
per head. An encoder balances the clusters as published, `cluster_size` queries
and keys each. That choice looks ahead, so a decoder takes the nearest centroid,
in chunks of `cluster_size` and the chunk before, with keys that are the queries
(as published); see `ops.routed.routing_attention`. O(T num_clusters + T
cluster_size).

The paper moves mu by an average over steps, which is state; here mu is a
parameter that learns from sum_t |x_t - mu_t|^2 / 2, which is added to the
gradient of the model's loss: the same direction, at the optimizer's pace. The
paper's heads with a local window are layers of their own here ('window' in the
pattern). The cache holds the key, the value and the cluster of every token.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.layers.cache import recall
from efficient_attn.layers.mixers.routed.heads import Routed, attach
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.ops.routed import routing_attention as ops
from efficient_attn.ops.routed.lsh_attention import bucket_attention
from efficient_attn.values import Positive


class Routing(Routed):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    num_clusters: Positive = 16,
    cluster_size: Positive = 256,
    **options,
  ):
    super().__init__(**options)
    rngs = options['rngs']
    axes = dict(zip(('heads', 'head_dim'), self.heads, strict=True))

    def project():
      return Projection({'embed': options['d_model']}, axes, rngs=rngs)

    self.query, self.value = project(), project()
    if self.causal:
      self.key = None
    else:
      self.key = project()
    shape = (self.heads[0], num_clusters, self.heads[1])
    self.centroids = param(
      jax.random.normal(rngs.params(), shape),
      ('heads', None, 'head_dim'),
      weight_decay=False,
    )
    self.num_clusters = num_clusters
    self.cluster_size = cluster_size

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    rotate = self.rotation(x, context, cache)
    centroids = value_of(self.centroids, jnp.float32)
    plain, value = ops.normalize(self.query(x)), self.value(x)
    layouts = ('BTNH', 'NCH')
    losses = sharding.local_op(ops.clustering_loss, layouts, 'BTN')
    loss = losses(plain, centroids)
    if self.causal:  # keys are queries
      clusters = sharding.local_op(ops.nearest, layouts, 'BTN')
      (key, value, clusters), cache, offset = recall(
        context,
        cache,
        key=rotate(plain),
        value=value,
        clusters=clusters(plain, centroids)[..., None],
      )
      layouts = ('BTNH', 'BSNH', 'BSNV', 'BSN_')
      op = sharding.local_op(
        bucket_attention, layouts, ('BTNV', 'BTN'), offset=''
      )
      o, _ = op(
        *(rotate(plain), key, value, clusters),
        num_buckets=self.num_clusters,
        chunk_size=self.cluster_size,
        offset=offset,
      )
    else:
      key = ops.normalize(self.key(x))
      loss += losses(key, centroids)
      layouts = (*['BTNH'] * 4, 'BTNV', 'NCH')
      op = sharding.local_op(self.encode, layouts, 'BTNV')
      o = op(rotate(plain), rotate(key), plain, key, value, centroids)
    return attach(self.out(o), jnp.sum(loss, -1)), cache

  def encode(self, query, key, plain, plain_key, value, centroids):
    """One shard of heads; every token may see every other."""
    members = functools.partial(
      ops.balanced_members, centroids=centroids, size=self.cluster_size
    )
    return ops.balanced_attention(
      query, key, value, members(plain), members(plain_key)
    )

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    clusters = (self.heads[0], 1)
    return super().init_cache(
      batch, max_len, dtype, clusters=clusters, dtypes={'clusters': jnp.int32}
    )
