"""Norms of head outputs [B, T, N, V], with a weight per head and channel."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.param import param, value_of

HEADS = ('heads', 'head_dim')


class HeadLayerNorm(nnx.Module):
  """Layer norm of every head: a group norm whose groups are the heads."""

  def __init__(
    self, num_heads: int, dim: int, *, eps: float = 1e-5, bias: bool = True
  ):
    self.scale = param(jnp.ones((num_heads, dim)), HEADS)
    self.bias = param(jnp.zeros((num_heads, dim)), HEADS) if bias else None
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of x [B, T, N, V]."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y = (
      x32 * jax.lax.rsqrt(variance + self.eps) * value_of(self.scale, x32.dtype)
    )
    if self.bias is not None:
      y = y + value_of(self.bias, x32.dtype)
    return y.astype(x.dtype)


class JointRMSNorm(nnx.Module):
  """RMS norm over the channels of all heads together, or of groups of them."""

  def __init__(
    self, num_heads: int, dim: int, *, eps: float = 1e-5, groups: int = 1
  ):
    self.scale = param(jnp.ones((num_heads, dim)), HEADS)
    self.eps = eps
    self.groups = groups

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last two axes of x [B, T, N, V]."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if self.groups == 1:
      mean_square = jnp.mean(x32 * x32, axis=(-2, -1), keepdims=True)
    else:
      heads = jnp.mean(x32 * x32, axis=-1)
      grouped = heads.reshape(*x.shape[:-2], self.groups, -1)
      mean_square = jnp.mean(grouped, axis=-1, keepdims=True)
      mean_square = jnp.broadcast_to(mean_square, grouped.shape)
      mean_square = mean_square.reshape(heads.shape)[..., None]
    y = x32 * jax.lax.rsqrt(mean_square + self.eps)
    return (y * value_of(self.scale, x32.dtype)).astype(x.dtype)
