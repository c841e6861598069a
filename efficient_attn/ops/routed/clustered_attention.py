"""Clustered attention and its improvement (Vyas et al. 2007.04825).

    A^c_j = softmax(q^c_j K^T / sqrt(H)),   q^c_j the mean query of cluster j
    o_i = A^c_{j(i)} V                                              (clustered)

Two queries' weights differ by at most |q_i - q^c_j| |K| / sqrt(H). Improved,
for the `top_k` keys S_j of the largest A^c_j:

    A^t_il = m_j softmax_{l in S_j}(q_i . k_l / sqrt(H)),   m_j = sum_S_j A^c_jl

and A^c elsewhere. The clusters are those of `iterations` of Lloyd's algorithm
on the signs of L random projections, by Hamming distance. For c clusters
O(T c (H + L iterations) + T top_k H) time and O(T (c + top_k H)) memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops.products import product
from efficient_attn.ops.softmax.normalizers import softmax


def clustered_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  clusters: Int[Array, 'B T N'],
  *,
  num_clusters: int,
  top_k: int = 0,
) -> Float[Array, 'B T N V']:
  """Attention of clusters of queries.

  Args:
    query: queries.
    key: keys.
    value: values.
    clusters: the cluster of every query, < num_clusters.
    num_clusters: how many there are.
    top_k: keys that every query weighs by itself; 0 for plain clustering.

  Returns:
    The output, in the query's dtype.
  """
  stats = jnp.promote_types(query.dtype, jnp.float32)
  groups = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, groups, 2) for x in (key, value))
  scale = query.shape[-1] ** -0.5
  q, k, v, ids = (jnp.moveaxis(x, 2, 1) for x in (query, key, value, clusters))
  chosen = jax.nn.one_hot(ids, num_clusters, dtype=stats)
  sizes = jnp.sum(chosen, 2)[..., None]
  means = product('bntc,bnth->bnch', chosen, q, operand=q.dtype)
  means = means / jnp.maximum(sizes, 1)
  logits = scale * product('bnch,bnsh->bncs', means, k)
  weights = softmax(logits)
  take = jax.vmap(jax.vmap(lambda x, i: x[i]))
  if top_k:
    _, best = jax.lax.top_k(
      jax.lax.stop_gradient(weights), min(top_k, k.shape[2])
    )
    mass = jnp.sum(jnp.take_along_axis(weights, best, -1), -1)
    seen = jnp.zeros(weights.shape, bool)
    seen = jnp.put_along_axis(seen, best, True, -1, inplace=False)
    weights = jnp.where(seen, 0, weights)
  out = product('bncs,bnsv->bncv', weights, v, operand=v.dtype)
  out = take(out, ids)
  if top_k:
    # Keys of a cluster, then of its queries.
    near, far = (take(take(x, best), ids) for x in (k, v))
    logits = scale * product('bnth,bntjh->bntj', q, near)
    weights = softmax(logits) * take(mass, ids)[..., None]
    out += product('bntj,bntjv->bntv', weights, far, operand=v.dtype)
  return jnp.moveaxis(out, 1, 2).astype(query.dtype)


def hamming_clusters(
  x: Float[Array, 'B T N H'],
  projections: Float[Array, 'N H L'],
  *,
  num_clusters: int,
  iterations: int,
) -> Int[Array, 'B T N']:
  """Lloyd's algorithm on the signs of projections.

  The first centroids are tokens at even distances; that of an empty cluster
  stays. Ties go to the first centroid, and to the sign +.
  """
  T = x.shape[1]
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  bits = product('btnh,nhl->bntl', x, projections)
  bits = jnp.where(bits > 0, 1.0, -1.0)
  centroids = bits[:, :, jnp.arange(num_clusters) * T // num_clusters]

  def assign(centroids):
    agree = product('bntl,bncl->bntc', bits, centroids)
    return jnp.argmax(agree, -1).astype(jnp.int32)

  def step(centroids, _):
    chosen = jax.nn.one_hot(assign(centroids), num_clusters)
    sums = product('bntc,bntl->bncl', chosen, bits)
    empty = jnp.sum(chosen, 2)[..., None] == 0
    return jnp.where(empty, centroids, jnp.where(sums >= 0, 1.0, -1.0)), None

  centroids, _ = jax.lax.scan(step, centroids, length=iterations)
  return jnp.moveaxis(assign(centroids), 1, 2)
