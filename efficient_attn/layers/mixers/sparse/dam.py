"""SparseBERT's differentiable attention mask, DAM (Shi et al. 2102.12871).

  o_t = sum_s M_n(s - t) e^(q_t . k_s / sqrt(H)) v_s / sum of the weights
  M_n(d) = sigmoid((alpha_n(d) + g - g') / temperature),   g, g' ~ Gumbel(0, 1)

with one alpha_n learned for every diagonal d of head n, shared by those at
`reach` and beyond. Without a `key` for the noise the mask is the likelier one,
1 where alpha > 0, and has the gradient of log sigmoid(alpha) where it is 1. The
first token of a sequence, and in an encoder the last, see all and are seen by
all. O(T^2). `penalty_weight` is lambda of the objective

  loss + lambda mean_{n, d} sigmoid(alpha_n(d)),

of what is likely to remain of the mask, as its sum in the paper.
"""

import jax
import jax.numpy as jnp

from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.param import param, value_of
from efficient_attn.ops import scores
from efficient_attn.values import NonNegativeFloat, Positive, PositiveFloat


class DAM(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    reach: Positive = 512,
    temperature: PositiveFloat = 1.0,
    penalty_weight: NonNegativeFloat = 0.0,
    **options,
  ):
    super().__init__(**options)
    start = jnp.ones((2 * reach + 1, self.num_heads))
    self.alpha = param(start, (None, 'heads'), weight_decay=False)
    self.temperature = temperature
    self.penalty_weight = penalty_weight

  def bias(self, offset, context, cursor, T, S):
    """The logarithm of M, but at the ends of a sequence."""
    score = scores.Diagonal(self.table(), offset)
    places = self.places(context, cursor, offset, T, S)
    score = scores.Except(score, self.ends(context, places), offset)
    more = super().bias(offset, context, cursor, T, S)
    return score if more is None else score + more

  def table(self, key=None):
    """The logarithm of M for every diagonal; `key` draws its noise."""
    alpha = value_of(self.alpha, jnp.float32)
    if key is not None:
      noise = jax.random.logistic(key, alpha.shape)  # as g - g' is
      return jax.nn.log_sigmoid((alpha + noise) / self.temperature)
    soft = jax.nn.log_sigmoid(alpha)
    return jnp.where(alpha > 0, soft - jax.lax.stop_gradient(soft), -jnp.inf)

  def penalty(self):
    """What the mask adds to the objective."""
    likely = jax.nn.sigmoid(self.alpha[...])
    diagonals = self.alpha.shape[-2] * self.num_heads
    return self.penalty_weight * jnp.sum(likely) / diagonals

  def ends(self, context, places):
    """Which tokens every other sees, [#B, S]."""
    ends = places == 0
    if self.causal:
      return ends
    if context.segment_ids is None:
      return ends | (places == places.shape[1] - 1)
    edges = jnp.diff(context.segment_ids, axis=1) != 0
    return ends | jnp.pad(edges, ((0, 0), (0, 1)), constant_values=True)
