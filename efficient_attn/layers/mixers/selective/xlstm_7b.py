"""The mLSTM layer of xLSTM-7B (Beck et al. 2503.13427).

  C_t = f_t C_{t-1} + exp(i_t) k_t v_t^T,    n_t = f_t n_{t-1} + exp(i_t) k_t
  h_t = C_t^T q_t / max(|n_t . q_t|, 1),     f_t = sigmoid(cap(.))
  y_t = W_out (sigmoid(W_o x_t) * norm(h_t)),   cap(z) = 15 tanh(z / 15)

The memory of the mLSTM block with less around it: q, k (half as wide as x), v
and both gates are projections of x; there is no convolution, no projection up
and no skip. i_t = cap(.) starts at -10, so that little is written at first.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.head_norm import HeadLayerNorm
from efficient_attn.layers.mixers.selective.mlstm import MLSTM
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import Recurrent
from efficient_attn.values import ChunkSize, NonNegativeFloat, PositiveFloat


class XLSTM7B(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `eps` is added to the denominator of h.
  """

  recurrence = MLSTM.recurrence

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    expand_k: PositiveFloat = 0.5,
    expand_v: PositiveFloat = 1.0,
    gate_cap: PositiveFloat = 15.0,
    eps: NonNegativeFloat = 1e-6,
    norm_eps: PositiveFloat = 1e-6,
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    key_dim = int(expand_k * d_model / num_heads)
    value_dim = int(expand_v * d_model / num_heads)
    embed, gates = {'embed': d_model}, {'heads': num_heads}
    heads = {'heads': num_heads, 'head_dim': value_dim}
    self.qkv = QKV(
      d_model,
      query=(num_heads, key_dim),
      key=(num_heads, key_dim),
      value=(num_heads, value_dim),
      rngs=rngs,
    )
    self.gate = Projection(embed, heads, rngs=rngs)
    self.input_gate, self.forget_gate = (
      Projection(embed, gates, rngs=rngs) for _ in range(2)
    )
    self.input_bias = param(
      jnp.full((num_heads,), -10.0), ('heads',), weight_decay=False
    )
    self.forget_bias = param(
      jnp.linspace(3.0, 6.0, num_heads), ('heads',), weight_decay=False
    )
    self.norm = HeadLayerNorm(num_heads, value_dim, eps=norm_eps, bias=False)
    self.out = Projection(heads, embed, rngs=rngs)
    self.gate_cap = gate_cap
    self.sizes = dict(N=num_heads, H=key_dim, V=value_dim)
    self.options = dict(eps=eps, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    (q, k, v), _ = self.qkv(x)

    def gate(project, bias):
      z = project(x).astype(jnp.float32) + value_of(bias, jnp.float32)
      return self.gate_cap * jnp.tanh(z / self.gate_cap)

    forget = gate(self.forget_gate, self.forget_bias)
    h, state = self.scan(
      context,
      past,
      q=q,
      k=k,
      v=v,
      input_gate=gate(self.input_gate, self.input_bias),
      log_forget=jax.nn.log_sigmoid(forget),
    )
    return self.out(jax.nn.sigmoid(self.gate(x)) * self.norm(h)), state, None
