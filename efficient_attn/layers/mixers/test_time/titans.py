"""The neural memory of Titans (Behrouz et al. 2501.00663).

  M_t = m_t M_{t-1} - eta_t grad |f(k_t; W) - v_t|^2 / 2   past surprises
  W_t = (1 - alpha_t) W_{t-1} + M_t,   o_t = f(q_t; W_t)

per head, with alpha, m = sigmoid(W x) and eta = base_rate sigmoid(W x). The
memory f is a perceptron of `depth` layers, 4x as wide inside; depth 1 is
linear. q and k are l2-normalised after a short convolution and silu, and the
output normalised and gated. It is the memory alone (LMM): for the paper's
combinations with attention, put both into the pattern of a model.

`chunk_size` is the inner mini-batch, whose gradients are taken at the weights
before it, a part of the definition. It bounds what is stable: where all keys
are equal, chunk_size * eta / (1 - m) must stay below 2. The paper prints
neither base_rate nor the bias of alpha; here 0.1, and alpha starts near 0.02.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.test_time.fast_mlp import (
  FAST_WEIGHTS,
  FastMLP,
)
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import GatedOutput, Recurrent
from efficient_attn.values import (
  ChunkSize,
  NonNegative,
  Positive,
  PositiveFloat,
)


class Titans(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = FAST_WEIGHTS

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    depth: Positive = 2,
    base_rate: PositiveFloat = 0.1,
    conv_width: NonNegative = 4,
    chunk_size: ChunkSize = 16,
  ):
    if depth < 1:
      raise ConfigError(f'depth={depth} must be at least 1')
    head_dim = d_model // num_heads
    heads = (num_heads, head_dim)
    self.qkv = QKV(
      d_model,
      query=heads,
      key=heads,
      value=heads,
      conv_width=conv_width,
      rngs=rngs,
    )
    self.gates = Projection(
      {'embed': d_model}, {'heads': num_heads, 'gates': 3}, rngs=rngs
    )
    # Of alpha, m and eta.
    start = jnp.tile(jnp.array([-4.0, 0.0, 0.0]), (num_heads, 1))
    self.gate_bias = param(start, ('heads', 'gates'), weight_decay=False)
    widths = (head_dim, *[4 * head_dim] * (depth - 1), head_dim)
    self.model = FastMLP(num_heads, widths, norm=False, rngs=rngs)
    self.out = GatedOutput(d_model, num_heads, head_dim, rngs=rngs)
    self.base_rate = base_rate
    self.options = dict(activation='silu', chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    (q, k, v), tails = self.qkv(x, context, past.tails)
    gates = self.gates(x).astype(jnp.float32)
    gates = gates + value_of(self.gate_bias, jnp.float32)
    o, state = self.scan(
      context,
      past,
      q=l2_normalize(q),
      k=l2_normalize(k),
      v=v,
      log_decay=jax.nn.log_sigmoid(-gates[..., 0]),
      log_momentum=jax.nn.log_sigmoid(gates[..., 1]),
      learning_rate=self.base_rate * jax.nn.sigmoid(gates[..., 2]),
      **self.model.arrays(),
    )
    return self.out(o, x), state, tails

  def init_state(self, batch, max_len, dtype):
    """Returns the initial memory."""
    return self.model.init_state(batch, dtype, momentum=True)

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    return self.qkv.init_tails(batch, dtype)
