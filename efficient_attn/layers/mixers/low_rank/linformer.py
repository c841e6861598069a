"""Linformer (Wang et al. 2006.04768).

  o_t = sum_{i < R} softmax_i(q_t . (E k)_i / sqrt(H)) (F v)_i

E, F in R^{R x L} mix the keys and the values of up to L = `max_len` tokens into
R rows, the same for all heads; a shorter sequence takes the first columns.
With `share_projection` F is E. O(T R) time and memory. A row mixes all tokens:
there is no causal form, and nothing to rotate; positions are what E and F make
of them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.mixer import WholeMixer
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import Positive


class Linformer(WholeMixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    rank: Positive = 128,
    max_len: Positive = 4096,
    share_projection: bool = False,
    implementation: str | None = None,
  ):
    del causal  # always False, as the row says
    heads = (num_heads, d_model // num_heads)
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)

    def projection():  # of the variance of the paper's theorem
      rows = jax.random.normal(rngs.params(), (rank, max_len)) * rank**-0.5
      return param(rows, (None, None), weight_decay=True)

    self.key_rows = projection()
    self.value_rows = self.key_rows if share_projection else projection()
    self.out = Projection(
      {'heads': heads[0], 'head_dim': heads[1]}, {'embed': d_model}, rngs=rngs
    )
    self.implementation = implementation

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""
    length, max_len = x.shape[1], self.key_rows.shape[1]
    if length > max_len:
      raise ConfigError(
        f'linformer: {length} tokens but max_len={max_len}; raise it'
      )

    def op(query, key, value, key_rows, value_rows):
      key = jnp.einsum('rs,bsnh->brnh', key_rows, key)
      value = jnp.einsum('rs,bsnh->brnh', value_rows, value)
      return attention(query, key, value, implementation=self.implementation)

    op = sharding.local_op(op, ('BTNH',) * 3 + ('RS',) * 2, 'BTNV')
    rows = [
      value_of(p, x.dtype)[:, :length] for p in (self.key_rows, self.value_rows)
    ]
    return self.out(op(*self.qkv(x)[0], *rows))
