"""Gated short convolution, the layer of LFM2 (2511.23404).

  b, c, u = W_b x, W_c x, W_u x
  y = W_o (c * conv(b * u))

with a causal depthwise convolution of 3 tokens and no activation: the gates
choose what enters it and what leaves it. All it keeps of the past are the last
inputs of the convolution.
"""

from flax import nnx

from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.param import Projection
from efficient_attn.layers.recurrence import Convolved
from efficient_attn.values import Positive


class GatedConv(Convolved):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `bias` is that of the convolution and of all projections. Heads are groups of
  channels, for devices to share.
  """

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    conv_width: Positive = 3,
    bias: bool = False,
  ):
    del causal  # always True, as the row says
    embed, heads = {'embed': d_model}, split_heads(d_model, num_heads)
    self.input_gate, self.output_gate, self.value = (
      Projection(embed, heads, bias=bias, rngs=rngs) for _ in range(3)
    )
    self.conv = ShortConv(
      heads, conv_width, bias=bias, activation=None, rngs=rngs
    )
    self.out = Projection(heads, embed, bias=bias, rngs=rngs)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    gated = self.input_gate(x) * self.value(x)
    mixed, tail = self.convolve(gated, context, past)
    return self.out(self.output_gate(x) * mixed), None, tail

  def init_state(self, batch, max_len, dtype):
    """Returns None: all it keeps are the tails."""
    return None
