"""Position rules of attention: what turns heads, or is added to logits.

rotary   rotates queries and keys by their positions (Su et al. 2104.09864)
alibi    -slope_n |t - s| joins the logits (Press et al. 2108.12409)
t5       learns a number for each head and bucket of distances (Raffel et al.
1910.10683)
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.param import param
from efficient_attn.ops.positions import rotary
from efficient_attn.values import Positive, PositiveFloat, Share

# Whether queries and keys are rotated.
POSITIONS = {'none': False, 'rotary': True, 'alibi': False, 't5': False}


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Rotates the first `fraction` of the channels of every head."""

  base: PositiveFloat = 10_000.0
  fraction: Share = 1.0

  def __call__(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
    """Maps heads [B, T, N, H] at positions [T] or [B, T] to the same shape."""
    return rotary(heads, positions, base=self.base, fraction=self.fraction)


@dataclasses.dataclass(frozen=True)
class T5:
  """Buckets of distances, the last of all from `distance` on."""

  buckets: Positive = 32
  distance: Positive = 128

  def table(self, d_model: int, num_heads: int, rngs: nnx.Rngs) -> nnx.Param:
    """Returns the learned numbers [buckets, N]."""
    table = jax.random.normal(rngs.params(), (self.buckets, num_heads))
    return param(jnp.asarray(d_model**-0.5 * table), (None, 'heads'))
