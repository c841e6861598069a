"""Feature maps of linear attention: phi(q) . phi(k) stands for a kernel.

Random features estimate exp(x . y); FAVOR+ (2009.14794) by the expectation

  exp(x . y) = E_w[exp(w . x - |x|^2 / 2) exp(w . y - |y|^2 / 2)], w ~ N(0, I),

random Fourier features (2103.02143) by E_w[cos(w . (x - y))] =
exp(-|x - y|^2 / 2). Polynomial features are exact for their polynomial, with
every product of two channels kept once: d (d + 1) / 2 of them, not d^2.

A map that is positive keeps the denominator of normalised linear attention
away from zero. All maps act on the last axis.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from efficient_attn.ops.products import product


def elu_plus_one(x: Float[Array, '...']) -> Float[Array, '...']:
  """elu(x) + 1: exp(x) below zero, x + 1 above (Katharopoulos, 2006.16236)."""
  # As printed, exp(x) - 1 + 1 loses small features to rounding.
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def identity(x: Float[Array, '...']) -> Float[Array, '...']:
  """No feature map: the plain bilinear kernel q . k."""
  return x


def unit(x: Float[Array, '*batch H']) -> Float[Array, '*batch H']:
  """Vectors of length 1, x / |x|, and zero for zero."""
  x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(x32 * x32, -1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.where(square > 0, square, 1))
  return (x32 * inverse).astype(x.dtype)


def orthogonal_projection(
  key: Array, features: int, channels: int
) -> Float[Array, 'm H']:
  """Normal vectors that are orthogonal within blocks of `channels` of them.

  Each row alone is N(0, I); orthogonality lowers the variance of what they
  estimate together (2009.14794, section 3.2).
  """
  blocks = -(-features // channels)
  directions, lengths = jax.random.split(key)
  normal = jax.random.normal(directions, (blocks, channels, channels))
  q, r = jnp.linalg.qr(normal)
  # Without the signs of the diagonal, q would not be uniformly distributed.
  q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
  norms = jax.random.normal(lengths, (features, channels))
  norms = jnp.linalg.norm(norms, axis=-1, keepdims=True)
  return q.reshape(-1, channels)[:features] * norms


def positive_random(
  x: Float[Array, '*batch H'],
  projection: Float[Array, 'm H'],
  *,
  hyperbolic: bool = False,
  shift: bool = False,
) -> Float[Array, '*batch f']:
  """exp(w_i . x - |x|^2 / 2) / sqrt(f): positive features of exp(x . y).

  The exponent is |w_i|^2 / 2 - |w_i - x|^2 / 2, at most |w_i|^2 / 2 whatever x
  is. That is H / 2 on average, and float32 overflows at 88: heads of 64
  channels cannot overflow, heads of 256 can, by a key that is close to a row.

  Args:
    x: queries or keys.
    projection: the rows w_i, normal.
    hyperbolic: use w_i and -w_i, f = 2 m features of less variance.
    shift: subtract the largest exponent of each vector. For queries, where
      the factor cancels in the normalisation. A factor per key does not
      cancel, and one for all keys would let a token depend on later ones.
  """
  if hyperbolic:
    projection = jnp.concatenate([projection, -projection])
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  x32, projection = x.astype(dtype), projection.astype(dtype)
  exponent = product('...h,mh->...m', x32, projection)
  exponent = exponent - jnp.sum(x32 * x32, -1, keepdims=True) / 2
  if shift:
    largest = jnp.max(exponent, -1, keepdims=True)
    exponent = exponent - jax.lax.stop_gradient(largest)
  return (jnp.exp(exponent) / math.sqrt(len(projection))).astype(x.dtype)


def fourier(
  x: Float[Array, 'B T N H'], projection: Float[Array, 'N m H']
) -> Float[Array, 'B T N f']:
  """[sin(w_i . x), cos(w_i . x)] / sqrt(m), f = 2 m, w_i of each head."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  angle = product('btnh,nmh->btnm', x.astype(dtype), projection)
  waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
  return (waves / math.sqrt(projection.shape[1])).astype(x.dtype)


def cosine(
  x: Float[Array, 'B T N H'],
  positions: Num[Array, 'B T'] | Num[Array, 'T'],
  *,
  max_length: int,
) -> Float[Array, 'B T N f']:
  """[relu(x) cos(a t), relu(x) sin(a t)], a = pi / (2 max_length), f = 2 H.

  The kernel is relu(q_t) . relu(k_s) cos(a (t - s)), positive for distances
  up to `max_length` and zero there (cosFormer, 2202.08791).
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  angle = positions.astype(dtype)[..., None, None] * (math.pi / 2 / max_length)
  x32 = jax.nn.relu(x.astype(dtype))
  waves = [x32 * jnp.cos(angle), x32 * jnp.sin(angle)]
  return jnp.concatenate(waves, -1).astype(x.dtype)


def softmax_pair(x: Float[Array, '*batch H']) -> Float[Array, '*batch f']:
  """Hedgehog's features (2402.04347), the softmax of [x, -x], f = 2 H."""
  x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jax.nn.softmax(jnp.concatenate([x32, -x32], -1), -1).astype(x.dtype)


def quadratic(x: Float[Array, '*batch H']) -> Float[Array, '*batch f']:
  """[x_i^2, sqrt(2) x_i x_j (i < j)], f = H (H + 1) / 2, for (x . y)^2."""
  channels = x.shape[-1]
  half = channels // 2
  # x_i with x_{i + r}, indices modulo H: r <= H / 2 meets every pair once,
  # but r = H / 2 twice. Slices, where indices would be a gather.
  turns = range(1, (channels + 1) // 2)
  pairs = [x * jnp.roll(x, -r, -1) for r in turns]
  if channels % 2 == 0:
    pairs.append(x[..., :half] * x[..., half:])
  pairs = [pair * math.sqrt(2) for pair in pairs]
  return jnp.concatenate([x * x, *pairs], -1)


def taylor(x: Float[Array, '*batch H']) -> Float[Array, '*batch f']:
  """Features of 1 + x . y + (x . y)^2 / 2, f = 1 + H + H (H + 1) / 2."""
  one = jnp.ones_like(x[..., :1])
  return jnp.concatenate([one, x, quadratic(x) / math.sqrt(2)], -1)


def taylor_diagonal(
  x: Float[Array, '*batch H'],
  alpha: Float[Array, ''],
  beta: Float[Array, ''],
  gamma: Float[Array, ''],
) -> Float[Array, '*batch f']:
  """[alpha x_i^2, beta (4 / H)^(1/4) x_i, gamma], f = 2 H + 1.

  QT-ViT's compact map: the squares stand for all products of two channels.
  """
  linear = x * beta * (4 / x.shape[-1]) ** 0.25
  constant = gamma * jnp.ones_like(x[..., :1])
  return jnp.concatenate([x * x * alpha, linear, constant], -1)


FEATURE_MAPS = {
  'elu_plus_one': elu_plus_one,
  'identity': identity,
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
}
