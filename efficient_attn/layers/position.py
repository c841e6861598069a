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
from efficient_attn.values import Positive

# Whether queries and keys are rotated.
POSITIONS = {'none': False, 'rotary': True, 'alibi': False, 't5': False}


@dataclasses.dataclass(frozen=True)
class Alibi:
  """Slopes times distances; `scaled` by 1/sqrt(H) as the logits (Falcon)."""

  scaled: bool = False


@dataclasses.dataclass(frozen=True)
class T5:
  """Buckets of distances, the last of all from `distance` on."""

  buckets: Positive = 32
  distance: Positive = 128

  def table(self, d_model: int, num_heads: int, rngs: nnx.Rngs) -> nnx.Param:
    """Returns the learned numbers [buckets, N]."""
    table = jax.random.normal(rngs.params(), (self.buckets, num_heads))
    return param(jnp.asarray(d_model**-0.5 * table), (None, 'heads'))
