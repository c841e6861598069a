"""RMSNorm and LayerNorm with float32 statistics."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.param import param


class RMSNorm(nnx.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 1910.07467)."""

  def __init__(self, dim: int, *, eps: float = 1e-6):
    self.scale = param(jnp.ones(dim), (None,))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of x [..., dim]."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(mean_square + self.eps)
    return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
  """y = (x - mean) / sqrt(var + eps) * scale + bias (Ba et al., 1607.06450)."""

  def __init__(self, dim: int, *, eps: float = 1e-6):
    self.scale = param(jnp.ones(dim), (None,))
    self.bias = param(jnp.zeros(dim), (None,))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of x [..., dim]."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + self.eps)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS = {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}


def l2_normalize(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
  """Divides x by sqrt(|x|^2 + eps) over the last axis, in float32."""
  x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(square + eps)).astype(x.dtype)
