"""Tensor product attention, TPA (Zhang et al. 2501.06425).

  K_t = 1/r sum_{i <= r} a^i_t (x) rope(b^i_t)    a^i_t = W^A_i x_t in R^N
                                                  b^i_t = W^B_i x_t in R^H

are the keys of all heads of a token, [N, H], a sum of outer products; queries
and values likewise, with ranks of their own and values without positions. Then
attention as usual. The rotation of a factor b rotates the product, so that the
cache holds the factors: (k_rank + v_rank) (N + H) numbers a token, which every
call multiplies out, O(S (k_rank + v_rank) N H).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.mixers.compact.memory import Compact
from efficient_attn.layers.param import Projection
from efficient_attn.ops import masks
from efficient_attn.ops.positions import rotary
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import NonNegative, Positive, PositiveFloat


class TPA(Compact):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    head_dim: NonNegative = 0,
    q_rank: Positive = 6,
    k_rank: Positive = 2,
    v_rank: Positive = 2,
    rotary_base: PositiveFloat = 10_000.0,
    implementation: str | None = None,
  ):
    head_dim = head_dim or d_model // num_heads
    ranks = (q_rank, k_rank, v_rank)
    self.query, self.key, self.value = (
      Factors(d_model, rank, num_heads, head_dim, rngs=rngs) for rank in ranks
    )
    self.out = Projection(
      {'heads': num_heads, 'head_dim': head_dim}, {'embed': d_model}, rngs=rngs
    )
    self.causal = causal
    self.widths = dict(
      key_heads=(k_rank, num_heads),
      key_dims=(k_rank, head_dim),
      value_heads=(v_rank, num_heads),
      value_dims=(v_rank, head_dim),
    )
    self.rotary_base = rotary_base
    self.implementation = implementation

  def project(self, x, positions):
    """Returns the factors of queries, and of keys and values by name."""
    query, key, value = self.query(x), self.key(x), self.value(x)
    query, key = (
      (heads, rotary(dims, positions, base=self.rotary_base))
      for heads, dims in (query, key)
    )
    memory = (*key, *value)
    return query, dict(zip(self.widths, memory, strict=True))

  def attend(self, query, memory, mask):
    """Multiplies the factors out and attends."""

    def op(query, key, value, mask):
      return attention(
        *(product(*factors) for factors in (query, key, value)),
        mask=mask,
        implementation=self.implementation,
      )

    factors = ('BSRN', 'BSRH')
    op = sharding.local_op(
      op, (factors, factors, factors, masks.letters(mask)), 'BTNV'
    )
    key = memory['key_heads'], memory['key_dims']
    value = memory['value_heads'], memory['value_dims']
    return self.out(op(query, key, value, mask))


class Factors(nnx.Module):
  """Maps x [B, T, D] to factors [B, T, R, N] and [B, T, R, H]."""

  def __init__(self, d_model, rank, num_heads, head_dim, *, rngs: nnx.Rngs):
    self.heads, self.dims = (
      Projection(
        {'embed': d_model}, {'rank': rank} | last, init=xavier, rngs=rngs
      )
      for last in ({'heads': num_heads}, {'head_dim': head_dim})
    )

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a and b of the module docstring, for every rank."""
    return self.heads(x), self.dims(x)


def product(heads, dims):
  """The mean over ranks of outer products: [B, T, N, H]."""
  return jnp.einsum('bsrn,bsrh->bsnh', heads, dims) / heads.shape[2]


def xavier(key, shape, fan_in):
  """Uniform of variance 2 / (inputs + outputs), as the paper draws factors."""
  fan_out = math.prod(shape) // fan_in
  limit = math.sqrt(6 / (fan_in + fan_out))
  return jax.random.uniform(key, shape, minval=-limit, maxval=limit)
