"""cosFormer (Qin et al. 2202.08791).

  o_t = sum_s w_ts v_s / sum_s w_ts
  w_ts = (relu(q_t) . relu(k_s)) cos(pi (t - s) / (2 M))

The cosine of a difference splits into features of t and of s. M is the longest
distance with a weight, beyond which the cosine is negative: the length T of
the rows, as in the released code, or `max_length`. Packed segments have the M
of their row. With a cache M is what the cache has room for, so a prompt and
what follows it equal one call with as many tokens as that; a model that
decodes more or fewer tokens than it was trained on needs `max_length`.

More than `max_length` tokens are refused. With `segment_ids` it is segments
that have to be shorter, whose length is not known before the call. The
projections have no biases, unlike those of the released code.
"""

import jax.numpy as jnp

from efficient_attn.config import ConfigError
from efficient_attn.layers.cache import positions_of
from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.ops.recurrent import feature_maps
from efficient_attn.values import NonNegative


class CosFormer(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `max_length` = 0 takes the length of the rows, or of the cache.
  """

  def __init__(self, *, max_length: NonNegative = 0, **options):
    super().__init__(**options)
    self.max_length = max_length

  def features(self, q, k, positions):
    """Returns phi_t(q_t), phi_t(k_t); `positions` count in units of M."""
    return tuple(
      feature_maps.cosine(x, positions, max_length=1) for x in (q, k)
    )

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    length = x.shape[1]
    if context.segment_ids is None:
      self._check(length)
    sums, longest = past.state or (None, self.max_length or length)
    positions = positions_of(context, past.cursor, length)
    y, sums, tails = super().recur(
      x,
      context.replace(positions=positions / longest),
      past.replace(state=sums),
    )
    return y, (sums, longest), tails

  def init_state(self, batch, max_len, dtype):
    """Returns zeros, (S, z), and M: at most `max_len` tokens."""
    self._check(max_len)
    longest = jnp.array(self.max_length or max_len, jnp.int32)
    return super().init_state(batch, max_len, dtype), longest

  def _check(self, length):
    if self.max_length and length > self.max_length:
      raise ConfigError(
        f'cosformer: {length} tokens are more than max_length='
        f'{self.max_length}, past which weights are negative; raise '
        'max_length'
      )
