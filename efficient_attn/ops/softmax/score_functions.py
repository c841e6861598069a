"""Score functions of attention: what a query and a key make of each other.

  dot         q . k                          Luong et al. 1508.04025
  scaled_dot  q . k / sqrt(H)                Vaswani et al. 1706.03762
  general     q^T W k                        Luong et al. 1508.04025
  additive    w . tanh(W_q q + W_k k)        Bahdanau et al. 1409.0473

Dense references for `attend_logits`, one matrix of logits for each head.
O(T S H) time; additive holds O(T S A) numbers for A hidden channels.
`ops.attention` is scaled_dot with everything else, and dot with scale=1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.ops.products import product
from efficient_attn.ops.softmax.logits import heads_first


def dot(
  query: Float[Array, 'B T N H'], key: Float[Array, 'B S N H']
) -> Float[Array, 'B N T S']:
  """The products q . k."""
  return product('bnth,bnsh->bnts', heads_first(query), heads_first(key))


def scaled_dot(
  query: Float[Array, 'B T N H'], key: Float[Array, 'B S N H']
) -> Float[Array, 'B N T S']:
  """The products q . k / sqrt(H): of unit variance where q and k are."""
  return dot(query, key) * query.shape[-1] ** -0.5


def general(
  query: Float[Array, 'B T N G'],
  key: Float[Array, 'B S N H'],
  weight: Float[Array, 'N G H'],
) -> Float[Array, 'B N T S']:
  """The products q^T W k; queries and keys may differ in width."""
  return dot(jnp.einsum('btng,ngh->btnh', query, weight), key)


def additive(
  query: Float[Array, 'B T N G'],
  key: Float[Array, 'B S N H'],
  query_weight: Float[Array, 'N G A'],
  key_weight: Float[Array, 'N H A'],
  weight: Float[Array, 'N A'],
) -> Float[Array, 'B N T S']:
  """The network w . tanh(W_q q + W_k k) of one hidden layer."""
  rows = jnp.einsum('btng,nga->bnta', query, query_weight)
  columns = jnp.einsum('bsnh,nha->bnsa', key, key_weight)
  hidden = jnp.tanh(rows[:, :, :, None] + columns[:, :, None])
  return product('bntsa,na->bnts', hidden, weight)
