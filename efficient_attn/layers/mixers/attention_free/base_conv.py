"""Gated convolution, BaseConv of Zoology (Arora et al. 2312.04927).

  y = (W x + b) * conv(x)

with a short causal depthwise convolution. It moves tokens by fixed distances,
which is what recall needs beside a memory: pairs (key, value) become one token.
"""

from flax import nnx

from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.param import Projection
from efficient_attn.layers.recurrence import Convolved
from efficient_attn.values import Positive


class BaseConv(Convolved):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    conv_width: Positive = 3,
  ):
    del num_heads, causal  # no heads; causal is always True, as the row says
    channels = {'embed': d_model}
    self.project = Projection(channels, {'gate': d_model}, bias=True, rngs=rngs)
    self.conv = ShortConv(
      {'gate': d_model}, conv_width, bias=True, activation=None, rngs=rngs
    )

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    mixed, tail = self.convolve(x, context, past)
    return self.project(x) * mixed, None, tail

  def init_state(self, batch, max_len, dtype):
    """Returns None: all it keeps are the tails."""
    return None
