"""Gated DeltaProduct (Siems et al. 2502.10297).

Several delta-rule steps per token, so that the transition is a product of
`num_steps` generalised Householder matrices:

  S_{t,0} = alpha_t S_{t-1}
  S_{t,j} = S_{t,j-1} + beta_{t,j} k_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j})^T
  S_t = S_{t,n},     o_t = S_t^T q_t

It is Gated DeltaNet on a sequence n times as long, gated at the first step of
a token and read at the last. beta reaches 2 (`negative_eigenvalues`), so that
a product of two steps can rotate. Without `forget_gate` it is DeltaProduct.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import conv_taps
from efficient_attn.layers.decay import DecayGate
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import (
  GatedOutput,
  Recurrence,
  Recurrent,
)
from efficient_attn.ops.recurrent.delta_product import delta_product
from efficient_attn.values import (
  ChunkSize,
  NonNegative,
  Positive,
  PositiveFloat,
)


class DeltaProduct(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `key_dim` and `value_dim`, the widths of heads, are expand_k and expand_v
  times D / num_heads by default.
  """

  recurrence = Recurrence(
    delta_product,
    dict(q='BTNH', k='BTNMH', v='BTNMV', beta='BTNM', log_decay='BTN'),
    state='BNHV',
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    num_steps: Positive = 2,
    expand_k: PositiveFloat = 1.0,
    expand_v: PositiveFloat = 1.0,
    key_dim: NonNegative = 0,
    value_dim: NonNegative = 0,
    forget_gate: bool = True,
    negative_eigenvalues: bool = True,
    conv_width: NonNegative | None = None,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    key_dim = key_dim or int(expand_k * d_model / num_heads)
    value_dim = value_dim or int(expand_v * d_model / num_heads)
    self.qkv = QKV(
      d_model,
      query=(num_heads, key_dim),
      key=(num_heads, num_steps * key_dim),
      value=(num_heads, num_steps * value_dim),
      conv_width=conv_taps(conv_width, causal),
      rngs=rngs,
    )
    steps = {'heads': num_heads, 'steps': num_steps}
    self.beta = Projection({'embed': d_model}, steps, rngs=rngs)
    if forget_gate:
      self.gate = DecayGate(d_model, num_heads, rngs=rngs)
    else:
      self.gate = None
    self.out = GatedOutput(
      d_model, num_heads, value_dim, eps=norm_eps, rngs=rngs
    )
    self.num_steps = num_steps
    self.largest_beta = 2.0 if negative_eigenvalues else 1.0
    self.sizes = dict(N=num_heads, H=key_dim, V=value_dim)
    self.options = dict(bidirectional=not causal, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    (q, k, v), tails = self.qkv(x, context, past.tails)
    if tails is None:  # the convolution would have done this
      q, k, v = (jax.nn.silu(a) for a in (q, k, v))
    k, v = (a.reshape(*a.shape[:3], self.num_steps, -1) for a in (k, v))
    beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
    o, state = self.scan(
      context,
      past,
      q=l2_normalize(q),
      k=l2_normalize(k),
      v=v,
      beta=self.largest_beta * beta,
      log_decay=None if self.gate is None else self.gate(x),
    )
    return self.out(o, x), state, tails

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    return self.qkv.init_tails(batch, dtype)
