"""Gated DeltaNet (Yang et al. 2412.06464), the mixer of Qwen3-Next.

  S' = alpha_t S_{t-1}
  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T               o_t = S_t^T q_t

DeltaNet with the scalar decay of Mamba-2 and a silu-gated, normalised output.
Keys take 3/4 of the model's width and values twice that, as published.
"""

import jax
from flax import nnx

from efficient_attn.layers.decay import DecayGate
from efficient_attn.layers.mixers.selective.deltanet import DeltaNet
from efficient_attn.layers.recurrence import DELTA, GatedOutput
from efficient_attn.values import PositiveFloat


class GatedDeltaNet(DeltaNet):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = DELTA.taking(log_decay='BTN')
  output = GatedOutput

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    rngs: nnx.Rngs,
    expand_k: PositiveFloat = 0.75,
    expand_v: PositiveFloat = 1.5,
    **options,
  ):
    super().__init__(
      d_model=d_model,
      num_heads=num_heads,
      rngs=rngs,
      expand_k=expand_k,
      expand_v=expand_v,
      **options,
    )
    self.gate = DecayGate(d_model, num_heads, rngs=rngs)

  def decay(self, x: jax.Array) -> jax.Array:
    """Returns the log decays of the tokens, [B, T, N]."""
    return self.gate(x)
