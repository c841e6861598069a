"""Prunes a model: zeroes the smallest weights (Han et al. 1506.02626).

The matrices keep their shapes, so that it is no faster; it tells what a model
of fewer weights is worth.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.compress.matrices import map_matrices
from efficient_attn.config import ConfigError
from efficient_attn.layers.param import matrices_apart


def largest(x: jax.Array, share: float, stacked: int = 0) -> jax.Array:
  """Tells which weights stay when `share` of the smallest go, bool like x.

  Equal ones stay together. The leading `stacked` axes are matrices apart.
  """
  if not 0 <= share < 1:
    raise ConfigError(f'share={share} of the weights must be in [0, 1)')
  size = jnp.abs(x).reshape(*x.shape[:stacked], -1)
  least = jnp.sort(size, axis=-1)[..., int(share * size.shape[-1]), None]
  return (size >= least).reshape(x.shape)


def pruned(model: nnx.Module, share: float) -> nnx.Module:
  """Returns the model without `share` of the weights of every matrix."""

  def prune(p, start, end):
    del start, end
    apart = matrices_apart(p)
    return jnp.where(largest(p[...], share, apart), p[...], 0)

  return map_matrices(model, prune)
