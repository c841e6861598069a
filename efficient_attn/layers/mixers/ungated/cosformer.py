"""cosFormer (Qin et al. 2202.08791).

  o_t = sum_s w_ts v_s / sum_s w_ts
  w_ts = (relu(q_t) . relu(k_s)) cos(pi (t - s) / (2 M))

The cosine of a difference splits into features of t and of s. M, `max_length`,
is the longest distance with a weight: beyond it the cosine is negative, so
longer sequences are refused. With `segment_ids` the length of a segment is not
known before the call, and nothing may be longer than M.
"""

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.ungated.kernel import Kernel
from efficient_attn.ops.recurrent import feature_maps
from efficient_attn.values import Positive


class CosFormer(Kernel):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, *, max_length: Positive = 4096, **options):
    super().__init__(**options)
    self.max_length = max_length

  def features(self, q, k, positions):
    """Returns phi_t(q_t), phi_t(k_t)."""
    return tuple(
      feature_maps.cosine(x, positions, max_length=self.max_length)
      for x in (q, k)
    )

  def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
    """Mixes tokens; see `layers.mixers` for the contract."""
    if segment_ids is None:
      self._check(x.shape[1])
    return super().__call__(
      x, positions=positions, segment_ids=segment_ids, cache=cache
    )

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state, (S, z), for at most `max_length` tokens."""
    self._check(max_len)
    return super().init_cache(batch, max_len, dtype)

  def _check(self, length):
    if length > self.max_length:
      raise ConfigError(
        f'cosformer: {length} tokens are more than max_length='
        f'{self.max_length}, past which weights are negative; raise '
        'max_length'
      )
