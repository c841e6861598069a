"""Lightning attention (Qin et al. 2401.04658), as MiniMax-01 uses it.

  S_t = lambda_n S_{t-1} + k_t v_t^T     o_t = S_t^T q_t
  q, k, v = silu(W_q x), silu(W_k x), silu(W_v x)
  lambda_n = exp(-2^(-8 (n + 1) / N) (1 - depth + 1e-5)) for head n < N
  y = W_o (norm(o) * sigmoid(W_u x)),  norm(o) = scale * o / rms(o)

with the root mean square over all heads. Not normalised by a sum of weights:
the norm does that. The rates are the slopes of ALiBi, for a number of heads
that is no power of two those of its authors' code. The code of
TransNormerLLM (2307.14995) has a plain v, no scale and no sigmoid.

`rates='linear'` are those that the papers print, lambda_n = exp(-8 n / N
(1 - depth)): all heads but one in eight forget within a token. `decay=False` is
the form without a gate that surveys list.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.layers.head_norm import JointRMSNorm
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import LINEAR, Recurrent
from efficient_attn.ops.scores import alibi_slopes
from efficient_attn.values import ChunkSize, Fraction, NonNegative, OneOf


class Lightning(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `depth` is the place of the layer in its model, 0 for the first and 1 for the
  last: later layers forget more slowly. `head_dim` 0 is D / num_heads.
  """

  recurrence = LINEAR.taking(log_decay='N')

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    head_dim: NonNegative = 0,
    decay: bool = True,
    rates: Annotated[str, OneOf(('alibi', 'linear'))] = 'alibi',
    depth: Fraction = 0.0,
    silu_values: bool = True,
    norm_scale: bool = True,
    chunk_size: ChunkSize = 64,
  ):
    heads = (num_heads, head_dim or d_model // num_heads)
    d_in, inner = (
      {'embed': d_model},
      {'heads': heads[0], 'head_dim': heads[1]},
    )
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    self.gate = Projection(d_in, inner, rngs=rngs)
    self.out = Projection(inner, d_in, rngs=rngs)
    self.norm = JointRMSNorm(*heads, eps=1e-6) if norm_scale else _norm
    self.decay = (rates, depth) if decay else None
    self.silu_values = silu_values
    self.sizes = dict(N=heads[0], H=heads[1], V=heads[1])
    self.options = dict(
      scale=1, bidirectional=not causal, chunk_size=chunk_size
    )

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    (q, k, v), _ = self.qkv(x)
    heads = q.shape[2]
    o, state = self.scan(
      context,
      past,
      q=jax.nn.silu(q),
      k=jax.nn.silu(k),
      v=jax.nn.silu(v) if self.silu_values else v,
      log_decay=self.decay and jnp.asarray(log_decays(heads, *self.decay)),
    )
    y = self.out(self.norm(o) * jax.nn.sigmoid(self.gate(x)))
    return y, state, None


def log_decays(num_heads: int, rates: str, depth: float) -> np.ndarray:
  """Returns the log decay of each head, float32 [N]."""
  if rates == 'linear':
    slopes = 8 * np.arange(num_heads) / num_heads * (1 - depth)
  else:
    slopes = alibi_slopes(num_heads) * (1 - depth + 1e-5)
  return -slopes.astype(np.float32)


def _norm(o):
  """Divides o [B, T, N, V] by its root mean square over heads and channels."""
  o32 = o.astype(jnp.promote_types(o.dtype, jnp.float32))
  mean_square = jnp.mean(o32 * o32, axis=(-2, -1), keepdims=True)
  return (o32 * jax.lax.rsqrt(mean_square + 1e-6)).astype(o.dtype)
