"""Lambda layers (Bello 2102.08602, LambdaNetworks).

A context becomes a linear function, the lambda, that is applied to queries
without any attention matrix:

  o_t = (L + M_t)^T q_t     L   = sum_s softmax_s(k_s) v_s^T
                            M_t = sum_{|s - t| <= W/2} e_{s-t} v_s^T

in R^{X x V}, the softmax over positions for each of the X channels of the keys.
L holds the content, M_t the positions, with a learned e for each distance of a
window of W: a convolution of the values. All query heads share the lambdas.
O(T W X V) time and O(T X V) memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.ops.shapes import check_shapes
from efficient_attn.values import ConfigError


def lambda_layer(
  query: Float[Array, 'B T N X'],
  key: Float[Array, 'B T X'],
  value: Float[Array, 'B T V'],
  embedding: Float[Array, 'W X'],
) -> Float[Array, 'B T N V']:
  """Applies the lambdas of a sequence to its queries.

  Args:
    query: queries.
    key: keys, before their softmax.
    value: values.
    embedding: e for the distances -(W // 2) to W // 2; W is odd.

  Returns:
    The output in the values' dtype.
  """
  W, X = embedding.shape
  if W % 2 == 0:
    raise ConfigError(
      f'embedding has {W} distances: pass an odd number, the same to each side.'
    )
  B, T, V = value.shape
  rows = B, T, query.shape[2], X
  check_shapes({'query': (query, rows), 'key': (key, (B, T, X))})
  dtype = jnp.promote_types(value.dtype, jnp.float32)
  weights = jax.nn.softmax(key.astype(dtype), axis=1).astype(value.dtype)
  content = jnp.einsum('bsx,bsv->bxv', weights, value)
  position = jax.lax.conv_general_dilated(
    value.swapaxes(1, 2).reshape(B * V, T, 1),
    embedding[:, None],
    (1,),
    [(W // 2, W // 2)],
    dimension_numbers=('NWC', 'WIO', 'NWC'),
  )
  lambdas = content[:, None] + position.reshape(B, V, T, -1).transpose(
    0, 2, 3, 1
  )
  return jnp.einsum('btnx,btxv->btnv', query, lambdas)
