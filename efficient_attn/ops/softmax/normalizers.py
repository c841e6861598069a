"""What turns logits into weights: softmax, hard choices, alpha-entmax.

  softmax  p = e^z / sum e^z
  hard     p = one at the largest z; the gradient of the softmax
  gumbel   softmax((z + g) / temperature), g ~ Gumbel(0, 1): a relaxed sample
  entmax   p = [(alpha - 1) z - tau]_+^(1 / (alpha - 1)),  sum p = 1

Hard attention: Xu et al. (2015), https://arxiv.org/abs/1502.03044, with the
straight-through gradient of Bengio et al. (2013); Gumbel-softmax: Jang et al.
(2017), https://arxiv.org/abs/1611.01144; alpha-entmax: Peters et al. (2019),
https://arxiv.org/abs/1905.05702, softmax at alpha = 1 and sparsemax at 2. A
logit of -inf has no weight, and rows of nothing else weigh nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from efficient_attn.ops import masks, scores
from efficient_attn.ops.products import product
from efficient_attn.ops.softmax.hidden import may_hide, without_hidden
from efficient_attn.ops.softmax.score_functions import dot
from efficient_attn.ops.softmax.stats import Stats, exp_below, largest


def softmax(
  z: Float[Array, '*rows S'],
  where: Bool[Array | np.ndarray, '...'] | bool = True,
) -> Float[Array, '*rows S']:
  """Weights e^z over their sum, `where` there are any; else zeros."""
  if where is not True:
    z = jnp.where(where, z, -jnp.inf)
  top = largest(z)
  weights = exp_below(z, top[..., None])
  return Stats(top, jnp.sum(weights, axis=-1)).divide(weights)


def hard(z: Float[Array, '*rows S']) -> Float[Array, '*rows S']:
  """All weight on the largest logit (the first of equals), straight through."""
  soft = softmax(z)
  chosen = jax.nn.one_hot(jnp.argmax(z, axis=-1), z.shape[-1], dtype=z.dtype)
  chosen = jnp.where(soft > 0, chosen, 0)
  return soft + jax.lax.stop_gradient(chosen - soft)


def gumbel(
  z: Float[Array, '*rows S'],
  key: PRNGKeyArray,
  *,
  temperature: float = 1.0,
  straight_through: bool = False,
) -> Float[Array, '*rows S']:
  """A sample of one logit with probability softmax(z), relaxed or hard."""
  noisy = (z + jax.random.gumbel(key, z.shape, z.dtype)) / temperature
  return hard(noisy) if straight_through else softmax(noisy)


@jax.custom_vjp
def entmax(
  z: Float[Array, '*rows S'], alpha: Float[Array, '*#rows']
) -> Float[Array, '*rows S']:
  """alpha-entmax for 1 <= alpha <= 2, with gradients of both arguments.

  tau is found by bisection down to rounding. Correia et al. (2019),
  https://arxiv.org/abs/1909.00015, have the gradient of alpha.
  """
  alpha = alpha[..., None]
  # Where alpha is 1 the powers below mean nothing: any other alpha will do.
  slope = jnp.where(alpha == 1, 1, alpha - 1)
  y = slope * z
  top = jnp.max(y, axis=-1, keepdims=True)
  top = jnp.where(top == -jnp.inf, 0, top)

  def powers(tau):
    return jnp.maximum(y - tau, 0) ** (1 / slope)

  def halve(_, interval):
    low, high = interval
    tau = (low + high) / 2
    enough = jnp.sum(powers(tau), axis=-1, keepdims=True) >= 1
    return jnp.where(enough, tau, low), jnp.where(enough, high, tau)

  # At the left end the largest logit alone weighs 1, at the right none weighs
  # more than 1 / S.
  start = top - 1, top - z.shape[-1] ** -slope
  steps = jnp.finfo(z.dtype).nmant + 4
  low, _ = jax.lax.fori_loop(0, steps, halve, start)
  weights = powers(low)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights / jnp.where(total == 0, 1, total)
  return jnp.where(alpha == 1, softmax(z), weights)


def _entmax_forward(z, alpha):
  weights = entmax(z, alpha)
  return weights, (weights, alpha)


def _entmax_backward(residuals, cotangent):
  weights, shape_of = residuals
  alpha = shape_of[..., None]
  seen = weights > 0
  p = jnp.where(seen, weights, 1)
  s = jnp.where(seen, p ** (2 - alpha), 0)
  total = jnp.sum(s, axis=-1, keepdims=True)
  q = s / jnp.where(total == 0, 1, total)
  dz = s * (cotangent - jnp.sum(q * cotangent, axis=-1, keepdims=True))

  log = jnp.log(p)
  h = -weights * log

  def centred(x, weights):
    return x - weights * jnp.sum(x, axis=-1, keepdims=True)

  slope = jnp.where(alpha == 1, 1, alpha - 1)
  dp = (weights - q) / slope**2 + centred(h, q) / slope
  dp = jnp.where(alpha == 1, centred(h * log, weights) / 2, dp)
  dalpha = jnp.sum(dp * cotangent, axis=-1)
  axes = tuple(
    axis
    for axis in range(dalpha.ndim)
    if shape_of.shape[axis] == 1 and dalpha.shape[axis] > 1
  )
  return dz, jnp.sum(dalpha, axis=axes, keepdims=True)


entmax.defvjp(_entmax_forward, _entmax_backward)


def normalized_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  normalize: Callable[[Array], Array],
  mask: masks.Mask | None = None,
  bias: scores.Score | None = None,
  scale: float | None = None,
) -> Float[Array, 'B T N V']:
  """Attention with the weights that `normalize` makes of [B, N, T, S] logits.

  Dense: O(T S) time and memory. `ops.attention` is that of `softmax`.
  """
  T, S = query.shape[1], key.shape[1]
  groups = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  admitted = None
  if mask is not None:
    admitted = mask.dense(T, S)
  if may_hide(mask, T, S):
    heads = (x.swapaxes(1, 2) for x in (query, key, value))
    heads = without_hidden(admitted, *heads)
    query, key, value = (x.swapaxes(1, 2) for x in heads)
  logits = scale * dot(query, key)
  if bias is not None:
    logits = logits + bias.dense(T, S)
  if admitted is not None:
    logits = jnp.where(admitted, logits, -jnp.inf)
  weights = normalize(logits)
  out = product(
    'bnts,bsnv->btnv', weights, value, operand=value.dtype, dtype=logits.dtype
  )
  return out.astype(query.dtype)
