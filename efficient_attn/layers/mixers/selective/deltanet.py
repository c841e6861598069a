"""DeltaNet (Schlag et al. 2102.11174; Yang et al. 2406.06484).

  S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T     o_t = S_t^T q_t

q, k and v pass through a short convolution and silu, q and k have unit
length, beta = sigmoid(W_b x), and the output is normalised per head. With
`negative_eigenvalues` beta reaches 2 (Grazzi et al. 2411.12537), which state
tracking needs.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.conv import conv_taps
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import (
  DELTA,
  NormedOutput,
  Recurrent,
  with_key_heads,
)
from efficient_attn.values import ChunkSize, NonNegative, PositiveFloat


class DeltaNet(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `key_dim` and `value_dim`, the widths of heads, are expand_k and expand_v
  times D / num_heads by default. With `key_heads` below num_heads several value
  heads share a query and a key, as in Qwen3-Next.

  The other delta rules override what differs: `recurrence`, `output`, `decay`
  and `arrays`.
  """

  recurrence = DELTA
  output = NormedOutput

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    expand_k: PositiveFloat = 1.0,
    expand_v: PositiveFloat = 1.0,
    key_dim: NonNegative = 0,
    value_dim: NonNegative = 0,
    key_heads: NonNegative = 0,
    negative_eigenvalues: bool = False,
    conv_width: NonNegative | None = None,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    key_dim = key_dim or int(expand_k * d_model / num_heads)
    value_dim = value_dim or int(expand_v * d_model / num_heads)
    key_heads = key_heads or num_heads
    if num_heads % key_heads:
      raise ConfigError(
        f'key_heads={key_heads} does not divide num_heads={num_heads}'
      )
    if key_heads < num_heads:
      self.recurrence = with_key_heads(self.recurrence, key_heads)
    self.qkv = QKV(
      d_model,
      query=(key_heads, key_dim),
      key=(key_heads, key_dim),
      value=(num_heads, value_dim),
      conv_width=conv_taps(conv_width, causal),
      rngs=rngs,
    )
    self.beta = Projection({'embed': d_model}, {'heads': num_heads}, rngs=rngs)
    self.largest_beta = 2.0 if negative_eigenvalues else 1.0
    self.sizes = dict(N=num_heads, H=key_dim, V=value_dim)
    self.options = dict(bidirectional=not causal, chunk_size=chunk_size)
    self.out = self.output(
      d_model, num_heads, value_dim, eps=norm_eps, rngs=rngs
    )

  def decay(self, x: jax.Array) -> jax.Array | None:
    """Returns the log decays of the tokens."""
    return None

  def arrays(self, q, k, v, beta) -> dict[str, jax.Array]:
    """Returns the arguments of the op but the decay; q, k are of any norm."""
    return dict(q=l2_normalize(q), k=l2_normalize(k), v=v, beta=beta)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    (q, k, v), tails = self.qkv(x, context, past.tails)
    if tails is None:  # the convolution would have done this
      q, k, v = (jax.nn.silu(a) for a in (q, k, v))
    beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
    arrays = self.arrays(q, k, v, self.largest_beta * beta)
    o, state = self.scan(context, past, **arrays, log_decay=self.decay(x))
    return self.out(o, x), state, tails

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    return self.qkv.init_tails(batch, dtype)
