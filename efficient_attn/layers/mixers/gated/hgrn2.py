"""HGRN2 (Qin et al. 2404.07904): keys tied to the forget gate.

  S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T     o_t = S_t^T silu(W_q x_t)
  f_t = l + (1 - l) sigmoid(W_f x_t)            per key channel

The query is the output gate of HGRN. The output is normalised over all heads.
The paper learns one lower bound l per layer, zero in the first and growing
with depth; here it is the constant `lower_bound` of this layer.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.head_norm import JointRMSNorm
from efficient_attn.layers.param import Projection
from efficient_attn.layers.recurrence import LINEAR, Recurrent
from efficient_attn.values import BelowOne, ChunkSize, PositiveFloat


class HGRN2(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = LINEAR.taking(log_decay='BTNH')

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    lower_bound: BelowOne = 0.0,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    head_dim = d_model // num_heads
    heads = {'heads': num_heads, 'head_dim': head_dim}
    self.query, self.forget, self.value = (
      Projection({'embed': d_model}, heads, rngs=rngs) for _ in range(3)
    )
    self.norm = JointRMSNorm(num_heads, head_dim, eps=norm_eps)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)
    self.lower_bound = lower_bound
    self.sizes = dict(N=num_heads, H=head_dim, V=head_dim)
    self.options = dict(
      scale=1, bidirectional=not causal, chunk_size=chunk_size
    )

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    logits = self.forget(x).astype(jnp.float32)
    k = (1 - self.lower_bound) * jax.nn.sigmoid(-logits)
    if self.lower_bound:
      log_decay = jnp.log1p(-k)
    else:  # the same, where 1 - k would round to zero
      log_decay = jax.nn.log_sigmoid(logits)
    o, state = self.scan(
      context,
      past,
      q=jax.nn.silu(self.query(x)),
      k=k.astype(x.dtype),
      v=self.value(x),
      log_decay=log_decay,
    )
    return self.out(self.norm(o)), state, None
