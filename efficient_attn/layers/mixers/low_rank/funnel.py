"""The pooled attention of Funnel-Transformer (Dai et al. 2006.03236).

  o_p = sum_s softmax_s(q_p . k_s / sqrt(H)) v_s
  y_t = W_o o_{t // pool_size}

The queries come from means of `pool_size` tokens, keys and values from all
tokens. The published encoder keeps the short sequence for the blocks that
follow, with ever fewer tokens, and repeats entries up to the full length once,
in a decoder at the end. Here both ends are in one mixer, so that a block may
stand anywhere: the residual connection around it carries what the decoder takes
from the first layers, but the feed-forward layers save nothing. Positions are
rotary in place of the paper's relative ones, a pool at the mean of its tokens.
O(T^2 / pool_size). A pool mixes tokens on both sides: there is no causal form.
"""

import functools

import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import choose
from efficient_attn.layers.mixer import WholeMixer
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops.pooling import mean_pool, repeat
from efficient_attn.ops.positions import rotary
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import Positive


class Funnel(WholeMixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    pool_size: Positive = 2,
    position: str = 'rotary',
    implementation: str | None = None,
  ):
    del causal  # always False, as the row says
    choose('position', position, dict.fromkeys(('none', 'rotary')))
    heads = (num_heads, d_model // num_heads)
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    self.out = Projection(
      {'heads': heads[0], 'head_dim': heads[1]}, {'embed': d_model}, rngs=rngs
    )
    self.pool_size = pool_size
    self.position = position
    self.implementation = implementation

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""
    positions = context.positions
    length = x.shape[1]
    pool = functools.partial(mean_pool, size=self.pool_size)
    pooled = sharding.local_op(pool, ('BTD',), 'BTD')(x)
    query = self.qkv.query(pooled)
    key, value = self.qkv.key(x), self.qkv.value(x)
    if self.position == 'rotary':
      if positions is None:
        positions = jnp.arange(length)
      centers = pool(jnp.atleast_2d(positions).astype(jnp.float32))
      query = rotary(query, centers if positions.ndim == 2 else centers[0])
      key = rotary(key, positions)

    def attend(query, key, value):
      return attention(query, key, value, implementation=self.implementation)

    o = sharding.local_op(attend, ('BTNH', 'BSNH', 'BSNV'), 'BTNV')(
      query, key, value
    )
    widen = functools.partial(repeat, size=self.pool_size, length=length)
    return sharding.local_op(widen, ('BTD',), 'BTD')(self.out(o))
