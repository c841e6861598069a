"""MesaNet (von Oswald et al. 2506.05233): an optimal fit at every token.

  A_t = f_t A_{t-1} + b_t k_t k_t^T,   S_t = f_t S_{t-1} + b_t k_t v_t^T
  o_t = S_t^T (A_t + diag(ridge))^-1 q_t
  f_t = sigmoid(w_f x_t + c_f),  b_t = sigmoid(w_b x_t + c_b)     per head

q and k pass through a short convolution and silu and have unit length. The
ridge is 1/4 + softplus of a parameter per channel, 1 at first. The output is
normalised per head and, with `output_gate`, gated by silu(W_g x). Chunks solve
for o_t with `num_steps` of conjugate gradients, decoding solves exactly: longer
keys, which the op takes, would need more steps for the two to agree.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import ShortConv, convolve
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import (
  LINEAR,
  GatedOutput,
  NormedOutput,
  Recurrence,
  Recurrent,
)
from efficient_attn.ops.recurrent.mesa import mesa_recurrence
from efficient_attn.values import ChunkSize, Positive, PositiveFloat

SMALLEST_RIDGE = 0.25


class Mesa(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = Recurrence(
    mesa_recurrence,
    {**LINEAR.inputs, 'log_decay': 'BTN', 'beta': 'BTN', 'ridge': 'NH'},
    state=('BNHH', 'BNHV'),
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    conv_width: Positive = 4,
    output_gate: bool = False,
    norm_eps: PositiveFloat = 1e-5,
    num_steps: Positive = 30,
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    heads = (num_heads, d_model // num_heads)
    embed, each = {'embed': d_model}, {'heads': num_heads}
    wide = each | {'head_dim': heads[1]}
    self.query = Projection(embed, wide, rngs=rngs)
    self.key = Projection(embed, wide, rngs=rngs)
    self.value = Projection(embed, wide, rngs=rngs)
    self.query_conv = ShortConv(wide, conv_width, rngs=rngs)
    self.key_conv = ShortConv(wide, conv_width, rngs=rngs)
    self.forget = Projection(embed, each, bias=True, rngs=rngs)
    self.beta = Projection(embed, each, bias=True, rngs=rngs)
    start = math.log(math.expm1(1 - SMALLEST_RIDGE))
    self.ridge = param(
      jnp.full(heads, start), ('heads', 'head_dim'), weight_decay=False
    )
    output = GatedOutput if output_gate else NormedOutput
    self.out = output(d_model, *heads, eps=norm_eps, rngs=rngs)
    self.sizes = dict(N=heads[0], H=heads[1], V=heads[1])
    self.options = dict(num_steps=num_steps, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    (q, k), tails = convolve(
      (self.query_conv, self.key_conv),
      (self.query(x), self.key(x)),
      context,
      past.tails,
    )
    f32 = jnp.float32
    o, state = self.scan(
      context,
      past,
      q=l2_normalize(q),
      k=l2_normalize(k),
      v=self.value(x),
      log_decay=jax.nn.log_sigmoid(self.forget(x).astype(f32)),
      beta=jax.nn.sigmoid(self.beta(x).astype(f32)),
      ridge=SMALLEST_RIDGE + jax.nn.softplus(value_of(self.ridge, f32)),
    )
    return self.out(o, x), state, tails

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    convs = self.query_conv, self.key_conv
    return tuple(conv.init_state(batch, dtype) for conv in convs)
