"""Simplified linear attention of SLAB (Guo et al. 2405.11582).

  o_t = S_t^T relu(q_t) / (z_t . relu(q_t)) + (DWC(v))_t

S and z as in the Linear Transformer. DWC is a depthwise convolution with a
bias, over the images of the paper two-dimensional. Here it runs along the
sequence: over `conv_width` tokens up to t in a causal model, and centred on t
in an encoder, whose width must be odd.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.layers.param import fan_in_normal, param, value_of
from efficient_attn.ops.recurrent.short_conv import short_conv


class SLAB(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self, *, causal: bool, rngs: nnx.Rngs, dwc_width: int = 3, **options
  ):
    super().__init__(causal=causal, rngs=rngs, **options)
    if dwc_width < 1 or not (causal or dwc_width % 2):
      raise ConfigError(
        f'sla: dwc_width={dwc_width} must be at least 1, and odd in an encoder'
      )
    shape = (dwc_width, *self.heads)
    weight = fan_in_normal()(rngs.params(), shape, dwc_width)
    axes = (None, 'heads', 'head_dim')
    self.weight = param(weight, axes, weight_decay=False)
    self.bias = param(jnp.zeros(self.heads), axes[1:])
    self.causal = causal

  def features(self, q, k, positions):
    """Returns relu(q), relu(k)."""
    return jax.nn.relu(q), jax.nn.relu(k)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    arrays = self.arrays(x, context.positions)
    o, state = self.scan(context, past, **arrays)
    convolve = _causal if self.causal else _centred
    local, tail = sharding.local_op(
      convolve, ('BTNH', 'WNH', 'BT', 'BTNH'), ('BTNH', 'BTNH')
    )(
      arrays['v'],
      value_of(self.weight, x.dtype),
      context.segment_ids,
      past.tails,
    )
    return self.out(o + local + value_of(self.bias, x.dtype)), state, tail

  def init_tails(self, batch, dtype):
    """Returns the values before the first token, zeros."""
    return jnp.zeros((batch, self.weight.shape[0] - 1, *self.heads), dtype)


def _causal(x, weight, segment_ids, state):
  """Convolves x [B, T, N, H] with the taps [W, N, H], the last for now."""
  y, state = short_conv(
    _flat(x),
    _flat(weight),
    segment_ids=segment_ids,
    initial_state=None if state is None else _flat(state),
  )
  return y.reshape(x.shape), state.reshape(*state.shape[:2], *x.shape[2:])


def _centred(x, weight, segment_ids, state):
  """The same with the middle tap for now: a causal half and its mirror."""
  half = len(weight) // 2
  past, state = _causal(x, weight[: half + 1], segment_ids, None)
  if segment_ids is not None:
    segment_ids = jnp.flip(segment_ids, 1)
  after = jnp.flip(weight[half:], 0).at[-1].set(0)
  future, _ = _causal(jnp.flip(x, 1), after, segment_ids, None)
  return past + jnp.flip(future, 1), state


def _flat(x):
  """Heads and their channels as one axis."""
  return x.reshape(*x.shape[:-2], -1)
