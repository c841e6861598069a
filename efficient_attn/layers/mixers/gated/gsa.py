"""Gated slot attention (Zhang et al. 2409.07146).

  K_t = diag(alpha_t) K_{t-1} + (1 - alpha_t) k_t^T     V_t likewise with v_t
  o_t = V_t^T softmax(K_t q_t)
  alpha_t = sigmoid(W_a x_t)^(1/8)                      per slot

q, k and v pass through silu; the output is silu, normalised over all heads.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.head_norm import JointRMSNorm
from efficient_attn.layers.param import Projection
from efficient_attn.layers.recurrence import Recurrence, Recurrent
from efficient_attn.ops.recurrent.gated_slot_attention import (
  gated_slot_attention,
)
from efficient_attn.values import ChunkSize, Positive, PositiveFloat


class GSA(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = Recurrence(
    gated_slot_attention,
    dict(q='BTNH', k='BTNH', v='BTNH', log_decay='BTNM'),
    state=('BNMH', 'BNMH'),
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    num_slots: Positive = 64,
    gate_temperature: PositiveFloat = 8.0,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    head_dim = d_model // num_heads
    inputs = {'embed': d_model}
    heads = {'heads': num_heads, 'head_dim': head_dim}
    self.query, self.key, self.value = (
      Projection(inputs, heads, rngs=rngs) for _ in range(3)
    )
    slots = {'heads': num_heads, 'slots': num_slots}
    self.decay = Projection(inputs, slots, rngs=rngs)
    self.norm = JointRMSNorm(num_heads, head_dim, eps=norm_eps)
    self.out = Projection(heads, inputs, rngs=rngs)
    self.gate_temperature = gate_temperature
    self.sizes = dict(N=num_heads, M=num_slots, H=head_dim)
    self.options = dict(scale=1, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    logits = self.decay(x).astype(jnp.float32)
    o, state = self.scan(
      context,
      past,
      q=jax.nn.silu(self.query(x)),
      k=jax.nn.silu(self.key(x)),
      v=jax.nn.silu(self.value(x)),
      log_decay=jax.nn.log_sigmoid(logits) / self.gate_temperature,
    )
    return self.out(self.norm(jax.nn.silu(o))), state, None
