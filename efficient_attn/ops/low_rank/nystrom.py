"""Nystrom attention (Xiong et al. 2102.03902, Nystromformer).

  o = softmax(q k'^T) A^+ softmax(q' k^T) v,      A = softmax(q' k'^T)

with all products over sqrt(H). The landmarks q', k' are the means of
consecutive tokens, and A^+ is the pseudo-inverse, approached from
Z = A^T / (|A|_1 |A|_inf) by the iteration of order three of Razavi et al.

  Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

O(T M) time and memory for M landmarks. With every token its own landmark and
an exact inverse it is softmax attention: S S^+ S = S.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.ops.pooling import mean_pool
from efficient_attn.ops.products import exact, product
from efficient_attn.ops.shapes import check_shapes
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import ConfigError


def nystrom_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T N H'],
  value: Float[Array, 'B T N V'],
  *,
  num_landmarks: int,
  iterations: int | None = 6,
  implementation: str | None = None,
) -> Float[Array, 'B T N V']:
  """Attention through landmarks; every token sees every other.

  Args:
    query: queries.
    key: keys, one for each query.
    value: values.
    num_landmarks: most landmarks. A landmark is the mean of ceil(T / M) tokens,
      the last of what is left.
    iterations: of the pseudo-inverse; None for the exact one.
    implementation: of the two attentions with T rows or columns.

  Returns:
    The output in the query's dtype.
  """
  T, H = query.shape[1], query.shape[3]
  wanted = {'key': (key, query.shape)}
  wanted['value'] = value, query.shape[:3] + value.shape[3:]
  check_shapes(wanted)
  if num_landmarks < 1:
    raise ConfigError(f'num_landmarks = {num_landmarks}: pass 1 or more.')
  size = -(-T // num_landmarks)
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  rows, columns = mean_pool(query, size), mean_pool(key, size)
  logits = H**-0.5 * product('bmnh,blnh->bnml', rows, columns)
  core = jax.nn.softmax(logits, axis=-1)
  inverse = (
    jnp.linalg.pinv(core)
    if iterations is None
    else iterative_pinv(core, iterations)
  )
  summary = attention(rows, key, value, implementation=implementation)
  summary = exact('bnml,blnv->bmnv', inverse, summary.astype(dtype))
  # Not in bfloat16: entries of the inverse are large and of both signs, and
  # what the weights round off does not cancel as they do.
  out = attention(
    query.astype(dtype),
    columns.astype(dtype),
    summary,
    implementation=implementation,
  )
  return out.astype(query.dtype)


def iterative_pinv(
  matrix: Float[Array, '*B M M'], iterations: int
) -> Float[Array, '*B M M']:
  """The pseudo-inverse by matrix products alone.

  Each matrix starts from its own norms, as in the paper's equations; the
  authors' code takes the largest norm of the whole batch.
  """
  size = jnp.abs(matrix)
  norms = jnp.max(jnp.sum(size, -2), -1) * jnp.max(jnp.sum(size, -1), -1)
  start = matrix.swapaxes(-1, -2) / norms[..., None, None]
  eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

  def product(x, y):
    return jnp.matmul(x, y, precision='highest')

  def step(inverse, _):
    near = product(matrix, inverse)
    inner = 15 * eye - product(near, 7 * eye - near)
    return product(inverse, 13 * eye - product(near, inner)) / 4, None

  return jax.lax.scan(step, start, length=iterations)[0]
