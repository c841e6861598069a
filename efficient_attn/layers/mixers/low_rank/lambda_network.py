"""LambdaNetworks (Bello 2102.08602).

  y_t = concat_n((L + M_t)^T q_tn)

with a content lambda L and the position lambda M_t of a window of `window`
tokens around t, both in R^{key_dim x (D / num_heads)} and shared by all heads;
see `ops.low_rank.lambda_layer`. Queries and values are normalised, here by
RMSNorm: the batch statistics of the paper would be hidden state. There is no
projection behind the heads. O(T window key_dim D / num_heads). The softmax of L
runs over the whole sequence: there is no causal form.
"""

import jax
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.mixer import WholeMixer
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  value_of,
)
from efficient_attn.ops.low_rank.lambda_layer import lambda_layer
from efficient_attn.values import Positive


class LambdaNetwork(WholeMixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    key_dim: Positive = 16,
    window: Positive = 23,
  ):
    del causal  # always False, as the row says
    if window % 2 == 0:
      raise ConfigError(f'lambda: window={window} must be odd')
    value_dim = split_heads(d_model, num_heads)['head_dim']
    embed = {'embed': d_model}
    self.query = Projection(
      embed,
      {'heads': num_heads, 'head_dim': key_dim},
      init=fan_in_normal(key_dim**-0.5),
      rngs=rngs,
    )
    self.key = Projection(embed, {'key_dim': key_dim}, rngs=rngs)
    self.value = Projection(embed, {'value_dim': value_dim}, rngs=rngs)
    self.query_norm, self.value_norm = RMSNorm(key_dim), RMSNorm(value_dim)
    embedding = jax.random.normal(rngs.params(), (window, key_dim))
    self.embedding = param(embedding, (None, None), weight_decay=False)

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""
    op = sharding.local_op(lambda_layer, ('BTNX', 'BTX', 'BTV', 'WX'), 'BTNV')
    o = op(
      self.query_norm(self.query(x)),
      self.key(x),
      self.value_norm(self.value(x)),
      value_of(self.embedding, x.dtype),
    )
    o = sharding.constrain(o, 'batch', None, None, None)
    return o.reshape(x.shape)
