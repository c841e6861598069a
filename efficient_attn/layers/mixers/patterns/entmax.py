"""Adaptively sparse attention (Correia et al. 1909.00015): alpha-entmax.

  o_t = sum_s entmax_alpha_n(q_t . k_s / sqrt(H))_s v_s,
  alpha_n = 1 + sigmoid(a_n)

with a_n learned for every head n: between softmax, alpha = 1, and sparsemax,
alpha = 2, a weight is zero where a logit is low. O(T^2), dense.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.param import param, use
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.normalizers import entmax, normalized_attention


class Entmax(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, **options):
    super().__init__(**options)
    if self.sinks is not None or self.options['logits_soft_cap'] is not None:
      raise ConfigError('entmax has no sinks and no logits_soft_cap')
    start = jnp.zeros(self.num_heads)
    self.alpha = param(start, ('heads',), weight_decay=False)

  def read(self, query, key, value, mask, offset):
    """Reads through alpha-entmax."""

    def op(query, key, value, alpha, mask, bias):
      alpha = 1 + jax.nn.sigmoid(alpha)[None, :, None]
      normalize = functools.partial(entmax, alpha=alpha)
      return normalized_attention(
        query,
        key,
        value,
        normalize=normalize,
        mask=mask,
        bias=bias,
        scale=self.options['scale'],
      )

    alpha, bias = use(self.alpha, jnp.float32), self.bias(offset)
    letters = 'N', masks.letters(mask), masks.letters(bias)
    op = sharding.local_op(op, ('BTNH', 'BTKH', 'BTKV', *letters), 'BTNV')
    return op(query, key, value, alpha, mask, bias)
