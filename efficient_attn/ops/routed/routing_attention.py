"""Routing attention (Roy et al. 2003.05997): attention inside clusters.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the clusters of t

with queries and keys layer-normed without weights, as they are compared with
centroids mu by q . mu. `balanced_attention`, as published: every centroid takes
its w best queries and its w best keys, which attend to each other; a token of
several clusters has the mean of what they give, one of none has zero. That is
no decoder's: whether a token is among the w best depends on what follows. There
the clusters are those of the largest q . mu, in chunks of w as in
`lsh_attention.bucket_attention`, with keys that are the queries. O(T c H) for c
clusters and O(c w^2 H): with c = w = sqrt(T), O(T^1.5 H).

`clustering_loss` has the gradient sum_{t in c} mu_c - x_t of the online k-means
that moves the centroids in the paper, mu <- lambda mu + (1 - lambda) mean x.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops.products import product
from efficient_attn.ops.softmax.normalizers import softmax


def normalize(x: Float[Array, '*rows H']) -> Float[Array, '*rows H']:
  """Layer norm without weights: vectors of length sqrt(H)."""
  x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  x32 = x32 - jnp.mean(x32, -1, keepdims=True)
  variance = jnp.mean(x32 * x32, -1, keepdims=True)
  return (x32 * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def similarities(
  x: Float[Array, 'B T N H'], centroids: Float[Array, 'N C H']
) -> Float[Array, 'B T N C']:
  """X . mu, in at least float32."""
  stats = jnp.promote_types(x.dtype, jnp.float32)
  return product('btnh,nch->btnc', x.astype(stats), centroids.astype(stats))


def nearest(
  x: Float[Array, 'B T N H'], centroids: Float[Array, 'N C H']
) -> Int[Array, 'B T N']:
  """The centroid of every token."""
  return jnp.argmax(similarities(x, centroids), -1).astype(jnp.int32)


def clustering_loss(
  x: Float[Array, 'B T N H'], centroids: Float[Array, 'N C H']
) -> Float[Array, 'B T N']:
  """|x - mu|^2 / 2 for the centroid of every token; x has no gradient."""
  x = jax.lax.stop_gradient(x)
  stats = jnp.promote_types(x.dtype, jnp.float32)
  chosen = jax.nn.one_hot(
    nearest(x, centroids), centroids.shape[1], dtype=stats
  )
  mu = product('btnc,nch->btnh', chosen, centroids.astype(stats))
  return jnp.sum((x - mu) ** 2, -1) / 2


def balanced_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T N H'],
  value: Float[Array, 'B T N V'],
  query_members: Int[Array, 'B N C W'],
  key_members: Int[Array, 'B N C W'],
) -> Float[Array, 'B T N V']:
  """Attention of the queries of every cluster to its keys."""
  B, T, N, H = query.shape
  stats = jnp.promote_types(query.dtype, jnp.float32)
  take = jax.vmap(jax.vmap(lambda x, i: x[i]))
  q, k, v = (
    take(jnp.moveaxis(x, 2, 1), members)
    for x, members in (
      (query, query_members),
      (key, key_members),
      (value, key_members),
    )
  )
  logits = H**-0.5 * product('bncwh,bncsh->bncws', q, k)
  out = product(
    'bncws,bncsv->bncwv', softmax(logits), v, operand=v.dtype, dtype=stats
  )

  def put(out, members):
    members = members.reshape(-1)
    total = jnp.zeros((T, out.shape[-1]), stats)
    total = total.at[members].add(out.reshape(members.size, -1))
    times = jnp.zeros(T, stats).at[members].add(1)
    return total / jnp.maximum(times, 1)[:, None]

  out = jax.vmap(jax.vmap(put))(out, query_members)
  return jnp.moveaxis(out, 1, 2).astype(query.dtype)


def balanced_members(
  x: Float[Array, 'B T N H'], centroids: Float[Array, 'N C H'], size: int
) -> Int[Array, 'B N C W']:
  """The `size` best tokens of every centroid, in their order."""
  scores = jnp.moveaxis(similarities(x, centroids), 1, -1)
  best = jax.lax.top_k(jax.lax.stop_gradient(scores), min(size, x.shape[1]))[1]
  return jnp.sort(best, -1)
