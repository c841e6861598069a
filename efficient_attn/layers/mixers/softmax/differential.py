"""Differential attention (Ye et al. 2410.05258): the difference of two maps.

  o_t    = sum_s (softmax_s(q^1_t . k^1_s / sqrt(h)) -
                  lambda softmax_s(q^2_t . k^2_s / sqrt(h))) v_s
  lambda = exp(l^q1 . l^k1) - exp(l^q2 . l^k2) + lambda_init
  y_t    = W_O (1 - lambda_init) norm_per_head(o_t)

A head of width H has queries and keys of two halves, h = H / 2, and values of
H: with as many heads, as many parameters, operations and cached numbers as
softmax attention (the paper takes half the heads, of twice the width). Heads
share lambda. The paper's lambda_init is 0.8 - 0.6 exp(-0.3 (l - 1)) in layer l;
a mixer does not know its layer, so that it is an option, by default the limit.
DiffLlama's norm has no scale (`norm_scale=False`).
"""

import jax
import jax.numpy as jnp

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.softmax.weights import Softmax
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import param
from efficient_attn.values import Fraction, NonNegativeFloat


class Differential(Softmax):
  """The difference of the weights of two halves, with a norm behind."""

  parts_of_a_head = 2

  def __init__(
    self,
    *,
    lambda_init: Fraction = 0.8,
    norm_eps: NonNegativeFloat = 1e-5,
    norm_scale: bool = True,
    **told,
  ):
    super().__init__(**told)
    head_dim = told['heads'].dim
    if head_dim % 2:
      raise ConfigError(
        f'head_dim={head_dim} must be even: a head has two halves'
      )
    keys = jax.random.split(told['rngs'].params(), 4)
    self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
      param(0.1 * jax.random.normal(key, (head_dim // 2,)), (None,))
      for key in keys
    )
    self.norm = RMSNorm(head_dim, eps=norm_eps, learned=norm_scale)
    self.lambda_init = lambda_init

  def __call__(self, *arguments):
    """Normalises the difference."""
    return (1 - self.lambda_init) * self.norm(self.average(*arguments))

  def average(self, query, key, *others):
    """Reads with both halves and takes the difference."""
    first, second = (
      super(Differential, self).average(q, k, *others)
      for q, k in zip(
        jnp.split(query, 2, axis=-1), jnp.split(key, 2, axis=-1), strict=True
      )
    )
    return first - self.factor().astype(first.dtype) * second

  def factor(self) -> jax.Array:
    """Returns lambda, a scalar."""
    first = jnp.sum(self.lambda_q1[...] * self.lambda_k1[...])
    second = jnp.sum(self.lambda_q2[...] * self.lambda_k2[...])
    return jnp.exp(first) - jnp.exp(second) + self.lambda_init
