"""PaTH attention (Yang et al. 2505.16381): data-dependent positions.

  o_t = sum_s softmax_s(q_t^T (prod_{l in (s, t]} G_l) k_s / sqrt(H)) v_s
  G_t = I - beta_t w_t w_t^T,           beta_t = 2 sigmoid(w_b x_t + b)
  w_t = normalise(silu(conv_3(W_2 W_1 x)_t)),          W_1 of rank 32

per head. With `forget_gate` (PaTH-FoX) sum_{l in (s, t]} log f_l joins the
logits, f_t = sigmoid(w_f x_t + b_f), as in FoX; fla's kernels divide that sum
by sqrt(H) too. The cache holds every past value and every past key, turned by
all tokens since.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.cache import TokenCache, token_cache
from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import LowRank, Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops.softmax.path_attention import Past, path_attention
from efficient_attn.values import ChunkSize, Positive


class PaTH(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    direction_rank: Positive = 32,
    conv_width: Positive = 3,
    forget_gate: bool = False,
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    heads = (num_heads, d_model // num_heads)
    embed, each = {'embed': d_model}, {'heads': num_heads}
    wide = each | {'head_dim': heads[1]}
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    self.direction = LowRank(d_model, direction_rank, wide, rngs=rngs)
    self.conv = ShortConv(wide, conv_width, rngs=rngs)
    self.beta = Projection(embed, each, bias=True, rngs=rngs)
    if forget_gate:
      self.forget = Projection(embed, each, bias=True, rngs=rngs)
    else:
      self.forget = None
    self.out = Projection(wide, embed, rngs=rngs)
    self.heads = heads
    self.chunk_size = chunk_size

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    segment_ids = context.segment_ids
    (q, k, v), _ = self.qkv(x)
    w, tail = self.conv(
      self.direction(x),
      segment_ids=segment_ids,
      state=cache and cache.state,
    )
    gates = dict(beta=2 * jax.nn.sigmoid(self.beta(x).astype(jnp.float32)))
    if self.forget is not None:
      gate = self.forget(x).astype(jnp.float32)
      gates['log_forget'] = jax.nn.log_sigmoid(gate)

    past = {}
    if cache is not None:
      length, start = cache.cursor.length, cache.cursor.start
      past = dict(cache.buffers, length=length, start=start)

    def op(q, k, v, w, gates, segment_ids, past):
      out, past = path_attention(
        q,
        k,
        v,
        w,
        **gates,
        segment_ids=segment_ids,
        initial_state=Past(**past) if past else None,
        chunk_size=self.chunk_size,
      )
      return out, past._asdict() if past else {}

    op = sharding.local_op(
      op,
      (*['BTNH'] * 4, dict.fromkeys(gates, 'BTN'), 'BT', PAST),
      ('BTNV', PAST if past else {}),
    )
    w = l2_normalize(w.astype(jnp.float32))
    o, past = op(q, k, v, w, gates, segment_ids, past)
    if cache is not None:
      cache = TokenCache(
        buffers={
          name: past[name].astype(buffer.dtype)
          for name, buffer in cache.buffers.items()
        },
        cursor=cache.cursor.advance(x.shape[1], context),
        state=tail,
      )
    return self.out(o), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    return token_cache(
      batch,
      max_len,
      dtype,
      state=self.conv.init_state(batch, dtype),
      # Turned again by every token.
      dtypes={'key': jnp.float32, 'forget': jnp.float32},
      key=self.heads,
      value=self.heads,
      forget=self.heads[:1],
    )


# The layouts of `Past`.
PAST = dict(key='BSNH', value='BSNH', forget='BSN', length='', start='B')
