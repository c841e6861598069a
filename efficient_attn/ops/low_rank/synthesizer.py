"""Logits without queries and keys: Synthesizer (Tay et al. 2005.00743).

  dense              logits_t = W_2 relu(W_1 x_t + b_1) + b_2          in R^L
  factorised dense   logits_t[i b + j] = A(x_t)_i B(x_t)_j          a b = L
  random             logits_t = R_t                        learned, R in R^{LxL}
  factorised random  logits_t = R_1 R_2t          R_1, R_2 in R^{L x k}

for sequences of at most L tokens, of which key s takes entry s; the output is
softmax(logits) v. The factorised form is a product of entries, of which one
factor is repeated and the other tiled, not the matrix product that a survey
prints (Fournier et al. 2103.14636, eq. 26), which would cost O(T^3).
O(T^2) time and memory.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def factorized_dense(
  outer: Float[Array, 'B N T a'], inner: Float[Array, 'B N T b']
) -> Float[Array, 'B N T a*b']:
  """Logits whose entry i b + j is outer_i inner_j."""
  product = outer[..., :, None] * inner[..., None, :]
  return product.reshape(*product.shape[:-2], -1)


def factorized_random(
  rows: Float[Array, 'N T k'], columns: Float[Array, 'N S k']
) -> Float[Array, '1 N T S']:
  """The same logits for every sequence, of rank k."""
  return jnp.einsum('ntk,nsk->nts', rows, columns)[None]
