"""Attention with the score functions before the scaled product.

  additive   e_ts = w . tanh(W_q q_t + W_k k_s)     Bahdanau et al. 1409.0473
  luong      e_ts = q_t^T W k_s                     Luong et al. 1508.04025

and o_t = sum_s softmax_s(e_ts) v_s; see `ops.softmax.score_functions`. Both
come from recurrent translators, which knew positions: none are added here by
default. O(T^2), and additive holds O(T^2 H) numbers. The cache holds every past
key and value.
"""

import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.param import fan_in_normal, param, use
from efficient_attn.ops import masks
from efficient_attn.ops.softmax import score_functions
from efficient_attn.ops.softmax.logits import attend_logits

# Options of attention that have no place here, with their harmless values.
REFUSED = {
  'sinks': (None, False),
  'logits_soft_cap': (None,),
  'implementation': (None, 'reference'),
}


class Scored(Attention):
  """What the two share: everything but the score of a query and a key."""

  def __init__(self, *, position: str = 'none', **options):
    super().__init__(position=position, **options)
    for name, fine in REFUSED.items():
      if options.get(name) not in fine:
        raise ConfigError(
          f'{name}={options[name]!r} is for the mixer attention; leave it out'
        )
    choose('position', position, dict.fromkeys(('none', 'rotary')))

  def matrix(self, *shape, rngs: nnx.Rngs) -> nnx.Param:
    """A learned array for each head, [N, *shape]."""
    value = fan_in_normal()(rngs.params(), (self.num_heads, *shape), shape[0])
    axes = ('heads',) + (None,) * len(shape)
    return param(value, axes, weight_decay=True)

  def read(self, query, key, value, mask, offset):
    """Returns what every head reads, [B, T, N, V], shard by shard."""

    def op(query, key, value, mask, params):
      group = query.shape[2] // key.shape[2]
      key, value = (
        jnp.repeat(x.astype(query.dtype), group, axis=2) for x in (key, value)
      )
      if mask is not None:
        mask = mask.dense(query.shape[1], key.shape[1])
      logits = self.score(query, key, *params)
      return attend_logits(logits, value, mask=mask)

    params = [use(p, query.dtype) for p in self.params]
    layouts = ['N' + 'HA'[: p.ndim - 1] for p in params]
    op = sharding.local_op(
      op, ('BTNH', 'BTKH', 'BTKV', masks.letters(mask), layouts), 'BTNV'
    )
    return op(query, key, value, mask, params)


class Additive(Scored):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  score = staticmethod(score_functions.additive)

  def __init__(self, *, rngs: nnx.Rngs, **options):
    super().__init__(rngs=rngs, **options)
    dim = self.kv_heads[1]
    shapes = ((dim, dim), (dim, dim), (dim,))
    self.params = nnx.List(self.matrix(*shape, rngs=rngs) for shape in shapes)


class Luong(Scored):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  score = staticmethod(score_functions.general)

  def __init__(self, *, rngs: nnx.Rngs, **options):
    super().__init__(rngs=rngs, **options)
    dim = self.kv_heads[1]
    self.params = nnx.List([self.matrix(dim, dim, rngs=rngs)])
