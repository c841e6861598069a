"""CHAI: heads that attend alike share one map.

    o_n = softmax(q_r K_r^T / sqrt(H)) V_n,   r = representative of head n

Agarwal et al., https://arxiv.org/abs/2403.08058. O(C S H) scores instead of
O(N S H), and keys of C heads in the cache; every value is kept.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops.selection import scoring
from efficient_attn.ops.selection.kmeans import kmeans


def select_chai(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  *,
  num_clusters: int,
  probe: int = 5,
) -> Int[Array, 'B N']:
  """The head whose map each head uses.

  Heads are clustered by their maps of the first `probe` tokens, after which a
  head's representative never changes; the one nearest to the centre of a
  cluster represents it. The paper chooses the number of clusters of each layer
  offline, where the error of more stops falling.
  """
  B, _, N, _ = query.shape
  if not 1 <= num_clusters <= N:
    raise ValueError(
      f'num_clusters = {num_clusters} must be between 1 and the N = {N} heads.'
    )
  if num_clusters == N:
    return jnp.broadcast_to(jnp.arange(N), (B, N))
  maps = scoring.probabilities(query[:, :probe], key[:, :probe])
  maps = maps.reshape(B, N, -1)
  cluster, centres = kmeans(maps, num_clusters)
  distance = jnp.square(maps[:, :, None] - centres[:, None]).sum(-1)
  member = cluster[..., None] == jnp.arange(num_clusters)
  nearest = jnp.argmin(jnp.where(member, distance, jnp.inf), axis=1)
  return jnp.take_along_axis(nearest, cluster, axis=1)
