"""What the mixers with a recurrent state share: running the op, its output."""

import jax
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import Projection
from efficient_attn.ops.linear_attention import linear_attention


def run_linear(q, k, v, *, log_decay=None, segment_ids=None, state=None, **kw):
  """Runs `ops.linear_attention` on the shards: [B,T,K,H] -> [B,T,N,V], state.

  One new token is decoded by the recurrence itself.
  """
  if state is not None and q.shape[1] == 1:
    kw['form'] = 'recurrent'

  def op(q, k, v, log_decay, segment_ids, state):
    return linear_attention(
      q,
      k,
      v,
      log_decay=log_decay,
      segment_ids=segment_ids,
      initial_state=state,
      **kw,
    )

  def by_rank(leaf):
    return ('', 'N', 'BT', 'BTN', 'BTNH')[leaf.ndim]

  def state_layout(leaf):
    return ('', '', '', 'BNH', 'BNHV')[leaf.ndim]

  if kw.get('normalize'):
    states = ('BNHV', 'BNH')
  else:
    states = 'BNHV'
  outputs = ('BTNV', None if kw.get('bidirectional') else states)
  layouts = ('BTKH', 'BTKH', 'BTNV', by_rank, by_rank, state_layout)
  return sharding.local_op(op, layouts, outputs)(
    q, k, v, log_decay, segment_ids, state
  )


class GatedOutput(nnx.Module):
  """y = W_out (norm_per_head(o) * silu(W_gate x)), the RetNet/GLA output."""

  def __init__(self, d_model, num_heads, value_dim, *, rngs):
    heads = {'heads': num_heads, 'head_dim': value_dim}
    self.norm = RMSNorm(value_dim)
    self.gate = Projection({'embed': d_model}, heads, rngs=rngs)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)

  def __call__(self, o: jax.Array, x: jax.Array) -> jax.Array:
    """Maps heads o [B, T, N, V] and the mixer's input x to [B, T, D]."""
    return self.out(self.norm(o) * jax.nn.silu(self.gate(x)))
