"""Kimi Delta Attention (Kimi Linear, 2510.26692).

  S' = diag(alpha_t) S_{t-1}
  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T               o_t = S_t^T q_t

Gated DeltaNet with a decay per key channel. The projections of the decay and
of the sigmoid output gate have the rank of a head; with `gate_bias` the latter
has a bias, as in fla. A `decay_bound` below 0 is the lowest log decay, fla's
safe gate.
"""

from typing import Annotated

import jax
from flax import nnx

from efficient_attn.layers.decay import DecayGate
from efficient_attn.layers.mixers.selective.deltanet import DeltaNet
from efficient_attn.layers.recurrence import DELTA, GatedOutput
from efficient_attn.values import Range


class KDA(DeltaNet):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = DELTA.taking(log_decay='BTNH')

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    rngs: nnx.Rngs,
    gate_bias: bool = False,
    decay_bound: Annotated[float, Range(high=0)] = 0.0,
    **options,
  ):
    self.gate_bias = gate_bias
    super().__init__(d_model=d_model, num_heads=num_heads, rngs=rngs, **options)
    _, key_dim, value_dim = self.sizes.values()
    self.gate = DecayGate(
      d_model,
      num_heads,
      key_dim,
      rank=value_dim,
      lowest=1.0,
      bound=decay_bound,
      rngs=rngs,
    )

  def output(self, d_model, num_heads, value_dim, *, eps, rngs) -> nnx.Module:
    """Returns the module that maps (o, x) to y."""
    return GatedOutput(
      d_model,
      num_heads,
      value_dim,
      rngs=rngs,
      activation=jax.nn.sigmoid,
      rank=value_dim,
      gate_bias=self.gate_bias,
      eps=eps,
    )

  def decay(self, x: jax.Array) -> jax.Array:
    """Returns the log decays of the tokens, [B, T, N, H]."""
    return self.gate(x)
