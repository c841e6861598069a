"""A sequence through one vector: the compression task of MAD (2403.17844).

  z = hidden(tokens)[T],    logits[t] = unembed(f_2(f_1(z + position[t])))

with f(x) = gelu(W norm(x)), by tanh where MAD's is exact, and z what a language
model of the same config computes at the last token.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import AutoEncoderConfig
from efficient_attn.layers.norm import norm_of
from efficient_attn.layers.param import Projection
from efficient_attn.models.lm import LM
from efficient_attn.ops.positions import sinusoidal


class AutoEncoder(LM):
  """Maps token ids to logits of the same tokens, off the last one's vector."""

  def __init__(self, config: AutoEncoderConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    width = {'embed': config.d_model}
    norm = norm_of(config)
    self.decode_norms = nnx.List(norm(config.d_model) for _ in range(2))
    self.decode = nnx.List(
      Projection(width, width, bias=True, rngs=rngs) for _ in range(2)
    )

  def hidden(self, tokens, *, key=None):
    """Returns what the logits are read from, [B, T, D], and no cache.

    Args:
      tokens: int32 [B, T].
      key: PRNG key for dropout; None to not drop.
    """
    hidden, _ = super().hidden(tokens, key=key)
    rows = sinusoidal(jnp.arange(tokens.shape[1]), hidden.shape[-1])
    x = hidden[:, -1:] + rows.astype(hidden.dtype)
    for norm, project in zip(self.decode_norms, self.decode, strict=True):
      x = jax.nn.gelu(project(norm(x)))
    return x, None
