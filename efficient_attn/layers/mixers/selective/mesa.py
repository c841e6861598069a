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

from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import Projection, param, use
from efficient_attn.layers.recurrence import GatedOutput, NormedOutput, run_op
from efficient_attn.ops.recurrent.mesa import mesa
from efficient_attn.values import ChunkSize, Positive, PositiveFloat

SMALLEST_RIDGE = 0.25


class Mesa(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

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
    self.heads = heads
    self.options = dict(num_steps=num_steps, chunk_size=chunk_size)

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    past = cache or {}
    q, query_tail = self.query_conv(
      self.query(x),
      segment_ids=context.segment_ids,
      state=past.get('query_conv'),
    )
    k, key_tail = self.key_conv(
      self.key(x), segment_ids=context.segment_ids, state=past.get('key_conv')
    )
    f32 = jnp.float32
    o, state = run_op(
      mesa,
      dict(
        q=l2_normalize(q),
        k=l2_normalize(k),
        v=self.value(x),
        log_decay=jax.nn.log_sigmoid(self.forget(x).astype(f32)),
        beta=jax.nn.sigmoid(self.beta(x).astype(f32)),
        ridge=SMALLEST_RIDGE + jax.nn.softplus(use(self.ridge, f32)),
      ),
      segment_ids=context.segment_ids,
      state=past.get('state'),
      **self.options,
    )
    if cache is not None:
      cache = dict(state=state, query_conv=query_tail, key_conv=key_tail)
    return self.out(o, x), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state; `max_len` does not matter."""
    square = (batch, *self.heads, self.heads[1])
    return dict(
      state=(jnp.zeros(square), jnp.zeros(square)),
      query_conv=self.query_conv.init_state(batch, dtype),
      key_conv=self.key_conv.init_state(batch, dtype),
    )
