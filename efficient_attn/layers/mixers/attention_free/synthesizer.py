"""Synthesizer (Tay et al. 2005.00743): attention weights without products.

  o_t = sum_s softmax_s(F(x_t)_s) v_s

F is a network of one hidden layer ('dense'), a product of two smaller ones
('factorized_dense'), or does not look at x at all ('random', and
'factorized_random' of rank `rank`); see `ops.low_rank.synthesizer`. Entry s of
F is the weight of token s, for at most `max_len` tokens: positions are
absolute. A causal model masks the tokens after t. The cache holds past values.
O(T^2).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.cache import TokenCache, recall, token_cache
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  value_of,
)
from efficient_attn.ops.low_rank import synthesizer as ops
from efficient_attn.ops.softmax.logits import attend_logits, heads_first
from efficient_attn.values import Positive

KINDS = ('dense', 'factorized_dense', 'random', 'factorized_random')


class Synthesizer(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  packing = left_padding = False

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    kind: str = 'dense',
    max_len: Positive = 4096,
    rank: Positive = 8,
  ):
    choose('kind', kind, dict.fromkeys(KINDS))
    heads = {'heads': num_heads, 'head_dim': d_model // num_heads}
    self.value = Projection({'embed': d_model}, heads, rngs=rngs)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)

    def table(*shape, fan_in):
      value = fan_in_normal()(rngs.params(), (num_heads, *shape), fan_in)
      axes = ('heads',) + (None,) * len(shape)
      return param(value, axes, weight_decay=True)

    if 'dense' in kind:
      # The two factors are as equal as their product max_len allows.
      inner = max(
        i for i in range(1, math.isqrt(max_len) + 1) if max_len % i == 0
      )
      widths = [max_len]
      if kind == 'factorized_dense':
        widths = [max_len // inner, inner]
      self.hidden = nnx.List(
        Projection({'embed': d_model}, heads, bias=True, rngs=rngs)
        for _ in widths
      )
      dim = heads['head_dim']
      self.tables = nnx.List(table(dim, w, fan_in=dim) for w in widths)
      self.biases = nnx.List(
        param(jnp.zeros((num_heads, w)), ('heads', None)) for w in widths
      )
    else:
      self.hidden, self.biases = nnx.List(), nnx.List()
      shapes = [(max_len, max_len)]
      if kind == 'factorized_random':
        shapes = [(max_len, rank)] * 2
      self.tables = nnx.List(table(*shape, fan_in=rank) for shape in shapes)
    self.causal = causal
    self.kind = kind
    self.max_len = max_len

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    (value,), cache, offset = recall(context, cache, value=self.value(x))
    self._check(value.shape[1])

    def op(hidden, tables, biases, value, *, offset):
      rows, columns = x.shape[1], value.shape[1]
      logits = self.logits(hidden, tables, biases, offset, rows, columns)
      mask = None
      if self.causal:
        seen = offset + jnp.arange(rows)[:, None]
        mask = (jnp.arange(columns) <= seen)[None, None]
      return attend_logits(logits, value.astype(x.dtype), mask=mask)

    def ranks(leaf):
      return {2: 'NL', 3: 'NHL', 4: 'BTNH'}[leaf.ndim]

    op = sharding.local_op(op, (*[ranks] * 3, 'BSNV'), 'BTNV', offset='')
    o = op(
      [jax.nn.relu(hidden(x)) for hidden in self.hidden],
      [value_of(p, x.dtype) for p in self.tables],
      [value_of(p, x.dtype) for p in self.biases],
      value,
      offset=offset,
    )
    return self.out(o), cache

  def logits(self, hidden, tables, biases, offset, rows, columns):
    """Returns [#B, N, rows, columns] for the tokens from `offset` on."""
    if self.kind == 'dense':  # only the columns of tokens that there are
      tables, biases = (
        [x[..., :columns] for x in xs] for xs in (tables, biases)
      )
    if 'dense' in self.kind:
      outputs = [
        jnp.einsum('bnth,nhl->bntl', heads_first(h), table) + bias[:, None]
        for h, table, bias in zip(hidden, tables, biases, strict=True)
      ]
      if self.kind == 'dense':
        return outputs[0]
      return ops.factorized_dense(*outputs)[..., :columns]
    first = jax.lax.dynamic_slice_in_dim(tables[0], offset, rows, axis=1)
    if self.kind == 'random':
      return first[None, ..., :columns]
    return ops.factorized_random(first, tables[1][:, :columns])

  def init_cache(self, batch: int, max_len: int, dtype) -> TokenCache:
    """Returns room for `max_len` values; writing past it is wrong."""
    self._check(max_len)
    heads = self.out.weight.shape[:2]
    return token_cache(batch, max_len, dtype, value=heads)

  def _check(self, length):
    if length > self.max_len:
      raise ConfigError(
        f'synthesizer: {length} tokens but max_len={self.max_len}; raise it'
      )
