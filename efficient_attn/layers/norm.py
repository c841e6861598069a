"""RMSNorm and LayerNorm with float32 statistics."""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ModelConfig, choose
from efficient_attn.layers.param import param
from efficient_attn.values import NonNegativeFloat, read_arguments


class RMSNorm(nnx.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 1910.07467).

  With `zero_centered` the parameter is scale - 1, as in Gemma; without
  `learned` there is none.
  """

  def __init__(
    self,
    dim: int,
    *,
    eps: NonNegativeFloat = 1e-6,
    zero_centered: bool = False,
    learned: bool = True,
  ):
    start = jnp.zeros(dim) if zero_centered else jnp.ones(dim)
    self.scale = param(start, (None,)) if learned else None
    self.eps, self.zero_centered = eps, zero_centered

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of x [..., dim]."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(mean_square + self.eps)
    if self.scale is None:
      return y.astype(x.dtype)
    scale = self.scale[...]
    if self.zero_centered:  # 1 + scale has no room for scale in bfloat16
      scale = 1 + scale.astype(y.dtype)
    return (y * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
  """y = (x - mean) / sqrt(var + eps) * scale + bias (Ba et al., 1607.06450)."""

  def __init__(
    self, dim: int, *, eps: NonNegativeFloat = 1e-6, bias: bool = True
  ):
    self.scale = param(jnp.ones(dim), (None,))
    self.bias = param(jnp.zeros(dim), (None,)) if bias else None
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of x [..., dim]."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + self.eps) * self.scale[...]
    return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


NORMS = {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}


def norm_options(name: str) -> dict[str, inspect.Parameter]:
  """Returns the options of a norm, with their defaults, by name."""
  norm = choose('model.norm', name, NORMS)
  found = inspect.signature(norm.__init__).parameters
  return {k: p for k, p in found.items() if k not in ('self', 'dim')}


def norm_of(config: ModelConfig) -> Callable[[int], nnx.Module]:
  """Returns the constructor of the norms of a model, with its options."""
  kinds = {k: p.annotation for k, p in norm_options(config.norm).items()}
  options = read_arguments(kinds, config.norms, 'model.norms.', config.norm)
  return functools.partial(NORMS[config.norm], **options)


def l2_normalize(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
  """Divides x by sqrt(|x|^2 + eps) over the last axis, in float32."""
  x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(square + eps)).astype(x.dtype)
