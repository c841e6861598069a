"""FNet (Lee-Thorp et al. 2105.03824).

  y = Re(F_seq(F_hidden(x)))

The discrete Fourier transform over tokens and channels, not normalised, without
any parameter. O(T log T). Every token sees every other: there is no causal
form.
"""

import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.mixer import WholeMixer


class FNet(WholeMixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self, *, d_model: int, num_heads: int, causal: bool, rngs: nnx.Rngs
  ):
    pass  # nothing to learn

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""

    def op(x):
      wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      return jnp.fft.fft2(wide, axes=(1, 2)).real.astype(x.dtype)

    return sharding.local_op(op, ('BTD',), 'BTD')(x)
