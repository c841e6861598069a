"""MoA, mixture of attention (Fu et al. 2406.14909): elastic windows per head.

  o_t = sum_{s: t - s < alpha_n + beta_n t or s < num_sinks}
        softmax_s(q_t . k_s / sqrt(H)) v_s

for head n, with t tokens read so far: the rule that the paper searches for
every head, alpha_n + beta_n N for an input of N tokens, as decoding meets it.
By default beta_n goes from 0 for the first head to 1 for the last, half of all
pairs on average. O(T^2 mean(beta)).
"""

import jax.numpy as jnp
import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks
from efficient_attn.values import NonNegative, Positive


class MoA(MaskRule):
  """The window of each head, and the sinks."""

  def __init__(
    self,
    *,
    alpha: Positive | tuple[Positive, ...] = 128,
    beta: float | tuple[float, ...] = (),
    num_sinks: NonNegative = 64,
    **told,
  ):
    super().__init__(**told)
    N = self.heads.query
    if beta == ():
      beta = tuple(np.linspace(0, 1, N))
    for name, value in (('alpha', alpha), ('beta', beta)):
      if np.size(value) not in (1, N) or np.min(value) < 0:
        raise ConfigError(
          f'{name}={value} must be one number, or one for each of'
          f' num_heads={N}, and not negative'
        )
    self.alpha = tuple(int(a) for a in np.broadcast_to(alpha, N))
    self.beta = tuple(round(1024 * float(b)) for b in np.broadcast_to(beta, N))
    self.num_sinks = num_sinks

  def mask(self, count):
    """Returns the mask of `count` keys."""
    window = masks.ElasticWindow(
      jnp.asarray(self.alpha), jnp.asarray(self.beta)
    )
    return window | masks.Prefix(self.num_sinks)
