"""Comba, bilinear recurrence with closed-loop control (2506.02475).

  S' = alpha_t S_{t-1}
  S_t = S' + beta_t k_t (v_t - S'^T p_t)^T      o_t = S_t^T (q_t - d p_t)
  p_t = b k_t,   b = sigmoid of a parameter and d a parameter per head

Gated DeltaNet whose erase is weaker than its write, and whose query leaves
out part of the key (output correction); d starts at 0.02.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers.selective.gated_deltanet import (
  GatedDeltaNet,
)
from efficient_attn.layers.param import param, use


class Comba(GatedDeltaNet):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self, *, d_model: int, num_heads: int, rngs: nnx.Rngs, **options
  ):
    super().__init__(d_model=d_model, num_heads=num_heads, rngs=rngs, **options)
    zeros = jnp.zeros((num_heads,))
    self.erase = param(zeros, ('heads',), weight_decay=False)
    self.correction = param(zeros + 0.02, ('heads',), weight_decay=False)

  def rule(self, q: jax.Array, k: jax.Array) -> dict[str, jax.Array]:
    """Returns corrected queries, keys and erase strengths."""
    erase = jax.nn.sigmoid(use(self.erase, jnp.float32))[:, None]
    correction = use(self.correction, jnp.float32)[:, None]
    q = (q - correction * erase * k).astype(q.dtype)
    return dict(q=q, k=k, erase=jnp.zeros(k.shape, jnp.float32) + erase)
