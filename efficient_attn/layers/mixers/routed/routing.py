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

from efficient_attn.layers.cache import append, extend
from efficient_attn.layers.mixer import refuse_segments
from efficient_attn.layers.mixers.routed.heads import Routed, attach, shard
from efficient_attn.layers.param import Projection, param, use
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
    refuse_segments('routing', context)
    self.check_cacheable(cache)
    rotate = self.rotation(x, context.positions, cache)
    query = ops.normalize(self.query(x))
    key = query if self.key is None else ops.normalize(self.key(x))
    op = shard(
      self.decode if self.causal else self.encode,
      ('BTNH', 'BTNH', 'BTNH', 'BTNH', 'BTNV', 'NCH'),
      ('BTNV', 'BTN'),
    )
    (o, loss), cache = op(
      rotate(query),
      rotate(key),
      query,
      key,
      self.value(x),
      use(self.centroids, jnp.float32),
      cache,
    )
    return attach(self.out(o), jnp.sum(loss, -1)), cache

  def decode(self, query, key, plain, _, value, centroids, cache):
    """One shard of heads, whose keys are their queries."""
    old, clusters = cache, ops.nearest(plain, centroids)[..., None]
    key, value, cache, offset = extend(cache, key, value)
    if cache is not None:
      clusters = append(old['clusters'], clusters, offset)
      cache['clusters'] = clusters
    out, _ = bucket_attention(
      query,
      key,
      value,
      clusters,
      num_buckets=self.num_clusters,
      chunk_size=self.cluster_size,
      offset=offset,
    )
    return (out, ops.clustering_loss(plain, centroids)), cache

  def encode(self, query, key, plain, plain_key, value, centroids, cache):
    """One shard of heads; every token may see every other."""
    members = functools.partial(
      ops.balanced_members, centroids=centroids, size=self.cluster_size
    )
    out = ops.balanced_attention(
      query, key, value, members(plain), members(plain_key)
    )
    losses = (ops.clustering_loss(x, centroids) for x in (plain, plain_key))
    return (out, sum(losses)), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    clusters = jnp.zeros((batch, max_len, self.heads[0], 1), jnp.int32)
    return super().init_cache(batch, max_len, dtype) | dict(clusters=clusters)
