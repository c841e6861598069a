"""Comba, bilinear recurrence with closed-loop control (2506.02475).

  S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T     o_t = S_t^T q_t
  p_t = b k'_t,   q_t = q'_t - d p_t,   b = sigmoid of a parameter

of q' and k' as projected, convolved and activated, per head. k, p and q have
unit length after that, as in fla's layer, so that b only weighs the output
correction d. Unlike in Gated DeltaNet the erase reads the state before it
decays, as in the paper and fla's kernels (its `naive_recurrent_comba` decays
first). The output gate is a sigmoid. The parameter of b and d start at 1; the
authors start small models at d = 0.02.

With `rule='gated_delta'` it is Gated DeltaNet whose erase is weaker than its
write: p_t = b k_t of the unit key reads alpha_t S_{t-1}, and the correction
comes after the query is normalised.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.ffn import ACTIVATIONS
from efficient_attn.layers.mixers.selective.gated_deltanet import (
  GatedDeltaNet,
)
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import param, value_of
from efficient_attn.layers.recurrence import (
  DELTA,
  DPLR,
  GatedOutput,
  Recurrence,
)
from efficient_attn.values import OneOf

# The recurrences of the two rules.
RULES = {
  'comba': DPLR.taking(log_decay='BTN'),
  'gated_delta': DELTA.taking(log_decay='BTN', erase='BTNH'),
}


class Comba(GatedDeltaNet):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    rngs: nnx.Rngs,
    rule: Annotated[str, OneOf(tuple(RULES))] = 'comba',
    output_gate: Annotated[str, OneOf(('sigmoid', 'silu'))] = 'sigmoid',
    **options,
  ):
    self.output_gate = output_gate
    if options.get('key_heads', num_heads) not in (0, num_heads):
      raise ConfigError(
        f'key_heads={options["key_heads"]} is not possible for comba, whose'
        ' corrections are one for each head; use key_heads=0'
      )
    super().__init__(d_model=d_model, num_heads=num_heads, rngs=rngs, **options)
    if rule == 'comba' and self.largest_beta > 1:
      raise ConfigError(
        "negative_eigenvalues=True lets the state of rule='comba' grow without "
        "bound; use rule='gated_delta'"
      )
    ones = jnp.ones((num_heads,))
    self.erase = param(ones, ('heads',), weight_decay=False)
    self.correction = param(ones, ('heads',), weight_decay=False)
    self.rule = rule

  @property
  def recurrence(self) -> Recurrence:
    """The op of the rule."""
    return RULES[self.rule]

  def output(self, d_model, num_heads, value_dim, *, eps, rngs) -> nnx.Module:
    """Returns the module that maps (o, x) to y."""
    return GatedOutput(
      d_model,
      num_heads,
      value_dim,
      activation=ACTIVATIONS[self.output_gate],
      eps=eps,
      rngs=rngs,
    )

  def arrays(self, q, k, v, beta):
    """Returns the arguments of the op but the decay; q, k are of any norm."""
    erase = jax.nn.sigmoid(value_of(self.erase, jnp.float32))[:, None]
    correction = value_of(self.correction, jnp.float32)[:, None]
    if self.rule == 'gated_delta':
      k = l2_normalize(k)
      q = (l2_normalize(q) - correction * erase * k).astype(q.dtype)
      erase = jnp.zeros(k.shape, jnp.float32) + erase
      return dict(q=q, k=k, v=v, beta=beta, erase=erase)
    p = erase * k
    write = (beta[..., None] * l2_normalize(k)).astype(k.dtype)
    return dict(
      q=l2_normalize((q - correction * p).astype(q.dtype)),
      k=write,
      v=v,
      a=l2_normalize(p.astype(k.dtype)),
      b=-write,
    )
