"""Adaptive attention span (Sukhbaatar et al. 1905.07799).

  o_t = sum_s m_n(t - s) e^(q_t . k_s / sqrt(H)) v_s / sum of the weights
  m_n(d) = clip((ramp + z_n - d) / ramp, 0, 1)

over the last `window` tokens, with z_n = window clip(span_n, 0, 1) learned for
each head n. The gradient of the clip is 1, as if the parameter were put back
after every step. What no head reaches is not computed. The cache holds the last
window - 1 keys and values. `penalty_weight` is lambda of the objective

  loss + lambda mean_n z_n,    2e-6 in the paper.
"""

import jax
import jax.numpy as jnp

from efficient_attn.layers.mixers.sparse.window import WindowRule
from efficient_attn.layers.param import clip_to_unit, param, value_of
from efficient_attn.ops import masks, scores
from efficient_attn.values import NonNegativeFloat, Positive


class AdaptiveSpan(WindowRule):
  """A window whose ramp every head learns."""

  def __init__(
    self,
    *,
    window: Positive = 1024,
    ramp: Positive = 32,
    span: float = 0.0,
    penalty_weight: NonNegativeFloat = 0.0,
    **told,
  ):
    super().__init__(window=window, **told)
    self.ramp = ramp
    start = jnp.full(self.heads.query, span)
    self.span = param(start, ('heads',), weight_decay=False)
    self.penalty_weight = penalty_weight

  def spans(self):
    """The span of every head, in tokens."""
    return self.window * clip_to_unit(value_of(self.span, jnp.float32))

  def penalty(self):
    """What the spans add to the objective."""
    # Not past the ends: nothing there would hold them.
    spans = self.window * jnp.clip(self.span[...], 0, 1)
    return self.penalty_weight * jnp.sum(spans) / self.heads.query

  def bias(self, offset):
    """The logarithm of the ramp."""
    return scores.SoftSpan(self.spans(), float(self.ramp), offset)

  def mask(self, count):
    """The window, without what no head reaches."""
    reach = jnp.ceil(jax.lax.stop_gradient(self.spans())) + self.ramp
    reach = reach.astype(jnp.int32)
    return super().mask(count) & masks.HeadWindow(reach, reach)
