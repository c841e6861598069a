"""Lightning attention (Qin et al. 2401.04658), of TransNormerLLM (2307.14995).

  S_t = lambda_n S_{t-1} + k_t v_t^T     o_t = S_t^T q_t
  q = silu(W_q x), k = silu(W_k x),  lambda_n = exp(-8 n / N) for head n < N
  y = W_o (norm(o) * sigmoid(W_u x)),  norm(o) = o / rms(o) over all heads

Not normalised by a sum of weights: the norm does that. The papers let the
decay of head n fade with depth, times 1 - layer / layers; a mixer does not know
its depth here, and all layers have the decay of the first. `decay=False` is
the form without a gate that surveys list.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.padding import without_padding
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import run_op
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.values import ChunkSize


class Lightning(nnx.Module):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    decay: bool = True,
    chunk_size: ChunkSize = 64,
  ):
    self.heads = heads = (num_heads, d_model // num_heads)
    d_in, inner = (
      {'embed': d_model},
      {'heads': heads[0], 'head_dim': heads[1]},
    )
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    self.gate = Projection(d_in, inner, rngs=rngs)
    self.out = Projection(inner, d_in, rngs=rngs)
    self.decay = decay
    self.options = dict(
      scale=1, bidirectional=not causal, chunk_size=chunk_size
    )

  def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
    """Mixes tokens; see `layers.mixers` for the contract."""
    x = without_padding(x, segment_ids)
    (q, k, v), _ = self.qkv(x)
    o, state = run_op(
      linear_attention,
      dict(
        q=jax.nn.silu(q),
        k=jax.nn.silu(k),
        v=v,
        log_decay=log_decays(self.heads[0]) if self.decay else None,
      ),
      segment_ids=segment_ids,
      state=cache and cache['state'],
      **self.options,
    )
    y = self.out(_norm(o) * jax.nn.sigmoid(self.gate(x)))
    return y, cache and dict(state=state)

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state; `max_len` does not matter."""
    n, h = self.heads
    return dict(state=jnp.zeros((batch, n, h, h)))


def log_decays(num_heads: int) -> jax.Array:
  """Returns -8 n / N for each head n, float32 [N]; head 0 never forgets."""
  return -8.0 * jnp.arange(num_heads) / num_heads


def _norm(o):
  """Divides o [B, T, N, V] by its root mean square over heads and channels."""
  o32 = o.astype(jnp.promote_types(o.dtype, jnp.float32))
  mean_square = jnp.mean(o32 * o32, axis=(-2, -1), keepdims=True)
  return (o32 * jax.lax.rsqrt(mean_square + 1e-6)).astype(o.dtype)
