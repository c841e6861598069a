"""Nystromformer (Xiong et al. 2102.03902).

  o = softmax(q k'^T) softmax(q' k'^T)^+ softmax(q' k^T) v + DWC(v)

with landmarks q', k', means of consecutive tokens; see `ops.low_rank.nystrom`.
DWC is a convolution along the sequence with `residual_width` taps for each
head, centred on the token; 0 leaves it out. O(T num_landmarks). Every landmark
is made of tokens on both sides of a query: there is no causal form.
"""

from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.mixer import WholeMixer
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  value_of,
)
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops.low_rank.banded_conv import banded_conv
from efficient_attn.ops.low_rank.nystrom import nystrom_attention
from efficient_attn.values import NonNegative, Positive


class Nystrom(WholeMixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    num_landmarks: Positive = 64,
    iterations: Positive | None = 6,
    residual_width: NonNegative = 65,
    implementation: str | None = None,
  ):
    del causal  # always False, as the row says
    if residual_width and residual_width % 2 == 0:
      raise ConfigError(
        f'nystrom: residual_width={residual_width} must be odd, or 0'
      )
    heads = (num_heads, d_model // num_heads)
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    if residual_width:
      shape = (residual_width, num_heads)
      taps = fan_in_normal()(rngs.params(), shape, residual_width)
      self.taps = param(taps, (None, 'heads'), weight_decay=False)
    else:
      self.taps = None
    self.out = Projection(
      {'heads': heads[0], 'head_dim': heads[1]}, {'embed': d_model}, rngs=rngs
    )
    self.options = dict(
      num_landmarks=num_landmarks,
      iterations=iterations,
      implementation=implementation,
    )

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""

    def op(query, key, value, taps):
      out = nystrom_attention(query, key, value, **self.options)
      return out if taps is None else out + banded_conv(value, taps)

    op = sharding.local_op(op, ('BTNH',) * 3 + ('WN',), 'BTNV')
    taps = None if self.taps is None else value_of(self.taps, x.dtype)
    return self.out(op(*self.qkv(x)[0], taps))
