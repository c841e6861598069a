"""Transformer-XL (Dai et al. 1901.02860).

  o_t = sum_s softmax_s(((q_t + u) . k_s + (q_t + w) . r_{t-s}) / sqrt(H)) v_s

with learned u, w for each head and r_d = W_R sinusoid(d); see
`ops.softmax.relative_attention`. A token sees itself and the `mem_len` tokens
before it. The paper's recurrence over segments is a sequence of calls with a
cache: it holds the last `mem_len` keys and values, instead of hidden states
that every call would project again, and no gradient flows into it. An encoder
sees all tokens of its segment, in both directions and at a cost of O(T^2).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.cache import WindowCache, window_cache
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  value_of,
)
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops.softmax import relative_attention as ops
from efficient_attn.values import Positive

# The layouts of the leaves of `ops.Memory` by rank.
MEMORY = {1: 'B', 4: 'BSNH'}


class TransformerXL(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    mem_len: Positive = 512,
  ):
    heads = (num_heads, d_model // num_heads)
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    self.relative = Relative(d_model, *heads, rngs=rngs)
    self.out = Projection(
      {'heads': heads[0], 'head_dim': heads[1]}, {'embed': d_model}, rngs=rngs
    )
    self.causal = causal
    self.heads = heads
    self.mem_len = mem_len

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""

    def op(query, key, value, relative, segment_ids, state):
      out, _ = ops.transformer_xl(
        query,
        key,
        value,
        *relative,
        memory=self.mem_len,
        segment_ids=segment_ids,
        initial_state=state,
        bidirectional=not self.causal,
      )
      return out

    (query, key, value), _ = self.qkv(x)
    state = None
    if cache is not None:
      length = jnp.sum(cache.real(), 1, dtype=jnp.int32)
      length = jnp.broadcast_to(length, x.shape[:1])
      state = ops.Memory(**cache.buffers, length=length)
      _, cache = cache.append(context, key=key, value=value)
    layouts = (*['BTNH'] * 3, RELATIVE, 'BT', lambda x: MEMORY[x.ndim])
    op = sharding.local_op(op, layouts, 'BTNV')
    relative, ids = self.relative(x.dtype), context.segment_ids
    return self.out(op(query, key, value, relative, ids, state)), cache

  def init_cache(self, batch: int, max_len: int, dtype) -> WindowCache:
    """Returns an empty memory; `max_len` does not matter."""
    return window_cache(
      batch, self.mem_len, dtype, key=self.heads, value=self.heads
    )


class Relative(nnx.Module):
  """W_R, u and w of the relative positions."""

  def __init__(self, d_model: int, num_heads: int, head_dim: int, *, rngs):
    shape = (d_model, num_heads, head_dim)
    axes = ('embed', 'heads', 'head_dim')
    weight = fan_in_normal()(rngs.params(), shape, d_model)
    self.weight = param(weight, axes, inputs=1)

    def bias():
      value = 0.02 * jax.random.normal(rngs.params(), shape[1:])
      return param(value, axes[1:], weight_decay=False)

    self.content_bias, self.position_bias = bias(), bias()

  def __call__(self, dtype):
    """Returns (W_R, u, w) in `dtype`, laid out as RELATIVE says."""
    params = (self.weight, self.content_bias, self.position_bias)
    return tuple(value_of(p, dtype) for p in params)


RELATIVE = ('DNH', 'NH', 'NH')
