"""sLSTM (xLSTM, Beck et al. 2405.04517).

  i, f = W_i x', W_f x'      z, o = W_z x, W_o x       x' = silu(conv(x))
  y = norm(cell(z, i, f, o))   per head, (h - mean) / sqrt(var + 1e-5) * scale

The cell has exponential gates and mixes its memory through recurrent matrices
(see `ops.slstm`). All matrices are block diagonal, one block per head: the
feed-forward layer that follows is what mixes heads. Recurrent matrices start
at zero, forget gates with biases from 5 down to -7 over the channels of a head.
The forward pass of xLSTM's code takes W_i from `fgate` and W_f from `igate`.
"""

import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.head_norm import HeadLayerNorm
from efficient_attn.layers.headwise import Headwise, split_heads
from efficient_attn.layers.norm import LayerNorm
from efficient_attn.layers.param import param, value_of
from efficient_attn.layers.recurrence import Convolved, Recurrence
from efficient_attn.ops.recurrent.slstm import slstm
from efficient_attn.values import Fraction, Positive


class SLSTM(Convolved):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `depth` is the place of the layer in its model, 0 for the first and 1 for the
  last: forget gates of later layers start with fewer open channels. The norm
  has a scale per head and channel, and no bias; with `shared_norm` all heads
  share a scale and a bias per channel, and epsilon is 1e-6.
  """

  recurrence = Recurrence(
    slstm,
    {**dict.fromkeys('zifo', 'BTNH'), 'recurrent': 'GNHV', 'bias': 'GNH'},
    state=('BNH',) * 4,
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    conv_width: Positive = 4,
    depth: Fraction = 0.0,
    shared_norm: bool = False,
  ):
    del causal  # always True, as the row says
    heads = split_heads(d_model, num_heads)
    shape = tuple(heads.values())
    self.conv = ShortConv(heads, conv_width, bias=True, rngs=rngs)
    self.z, self.i, self.f, self.o = (
      Headwise(*shape, rngs=rngs) for _ in range(4)
    )
    self.recurrent = param(
      jnp.zeros((4, *shape, shape[1])),
      (None, *heads, None),
      weight_decay=True,
    )
    ramp = jnp.linspace(0.0, 1.0, shape[1]) ** (0.3 + 1.3 * depth)
    bias = jnp.zeros((4, *shape)).at[2].set(5.0 - 12.0 * ramp)
    self.bias = param(bias, (None, *heads))
    self.norm = (
      LayerNorm(shape[1]) if shared_norm else HeadLayerNorm(*shape, bias=False)
    )
    self.sizes = dict(N=shape[0], H=shape[1])
    self.options = {}

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    heads = x.reshape(*x.shape[:2], self.sizes['N'], self.sizes['H'])
    smooth, tail = self.convolve(heads, context, past)
    h, state = self.scan(
      context,
      past,
      z=self.z(heads),
      i=self.i(smooth),
      f=self.f(smooth),
      o=self.o(heads),
      recurrent=value_of(self.recurrent, jnp.float32),
      bias=value_of(self.bias, jnp.float32),
    )
    y = sharding.constrain(self.norm(h), 'batch', None, None, None)
    return y.reshape(x.shape), state, tail
