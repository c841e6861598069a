"""Log-linear Mamba-2 (Guo et al. 2506.04761): a state per power of two.

  y_t = sum_s lambda_t[level(t, s)] exp(sum_{(s, t]} a_l) (C_t . B_s) dt_s x_s
  lambda_t = softplus(scale * W_lambda u_t),     a_t = -exp(A) dt_t

with u the input, and level(t, s) the number of binary digits of t XOR s, so
that 2^m past tokens share a weight. All else is Mamba-2. The cache holds one
state per binary digit of its length, up to `num_levels` - 1. With 15 levels
2^14 tokens fill them, and the last one holds everything further away. The rates
exp(A) start at 1, 2, ..., N over the heads, as in the released layer.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers.selective.mamba2 import Mamba2
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import Recurrence
from efficient_attn.ops.recurrent.log_linear import log_linear_attention
from efficient_attn.values import Range


class LogLinear(Mamba2):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = Recurrence(
    log_linear_attention,
    {**Mamba2.recurrence.inputs, 'level_scales': 'BTNL'},
    state=('BNMHV', 'B'),
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    rngs: nnx.Rngs,
    num_levels: Annotated[int, Range(2, 30)] = 15,
    **options,
  ):
    super().__init__(d_model=d_model, num_heads=num_heads, rngs=rngs, **options)
    rates = jnp.arange(1.0, num_heads + 1)
    self.a_log = param(jnp.log(rates), ('heads',), weight_decay=False)
    levels = {'heads': num_heads, 'levels': num_levels}
    self.levels = Projection({'embed': d_model}, levels, rngs=rngs)
    ones = jnp.ones((num_heads, num_levels))
    self.level_scale = param(ones, (*levels,), weight_decay=False)
    self.num_levels = num_levels

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    if past.state is None:
      past = past.replace(state=self.init_state(*x.shape[:2], x.dtype))
    return super().recur(x, context, past)

  def arrays(self, x, dt, bc, v):
    """Returns the arguments of the op, see `Mamba2.arrays`."""
    f32 = jnp.float32
    arrays = super().arrays(x, dt, bc, v)
    scales = self.levels(x).astype(f32) * value_of(self.level_scale, f32)
    return arrays | dict(level_scales=jax.nn.softplus(scales))

  def init_state(self, batch, max_len, dtype):
    """Returns zeros, with the buckets that `max_len` tokens need."""
    buckets = max((max_len - 1).bit_length(), 1)
    buckets = min(buckets, self.num_levels - 1)
    memory, count = self.recurrence.zeros(batch, {**self.sizes, 'M': buckets})
    return memory, count.astype(jnp.int32)
