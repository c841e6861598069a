"""What the normalised linear attentions share: everything but the kernel.

S_t = S_{t-1} + psi(k_t) v_t^T    z_t = z_{t-1} + psi(k_t)
o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

that is, attention with the weights phi(q_t) . psi(k_s) over their sum, and
zero where the sum is zero. An encoder sums over all tokens of the segment.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.cache import positions_of
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import LINEAR, Recurrent
from efficient_attn.values import ChunkSize


class KernelAttention(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; a subclass gives the `features`."""

  recurrence = dataclasses.replace(LINEAR, state=('BNHV', 'BNH'))  # (S, z)
  counts = True

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    chunk_size: ChunkSize = 64,
  ):
    self.heads = (num_heads, d_model // num_heads)
    keys = (num_heads, self.key_dim(self.heads[1]))
    self.qkv = QKV(d_model, query=keys, key=keys, value=self.heads, rngs=rngs)
    self.out = Projection(
      {'heads': self.heads[0], 'head_dim': self.heads[1]},
      {'embed': d_model},
      rngs=rngs,
    )
    self.options = dict(
      normalize=True, bidirectional=not causal, chunk_size=chunk_size
    )

  def key_dim(self, head_dim: int) -> int:
    """Returns the width of queries and keys before the feature map."""
    return head_dim

  def features(self, q, k, positions):
    """Returns phi(q), psi(k) [B, T, N, f] of q, k [B, T, N, key_dim]."""
    raise NotImplementedError

  def arrays(self, x, positions) -> dict[str, jax.Array]:
    """Returns the arguments of the op for the mixer's input."""
    (q, k, v), _ = self.qkv(x)
    q, k = self.features(q, k, positions)
    return dict(q=q, k=k, v=v)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    positions = positions_of(context, past.cursor, x.shape[1])
    o, state = self.scan(context, past, **self.arrays(x, positions))
    return self.out(o), state, None

  def init_state(self, batch, max_len, dtype):
    """Returns zeros, (S, z), as wide as the features."""
    n, h = self.heads
    one = jax.ShapeDtypeStruct((batch, 1, n, self.key_dim(h)), dtype)
    position = jax.ShapeDtypeStruct((1,), jnp.int32)
    f = jax.eval_shape(self.features, one, one, position)[1].shape[-1]
    return self.recurrence.zeros(batch, dict(N=n, H=f, V=h))
