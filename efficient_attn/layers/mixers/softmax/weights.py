"""How an attention layer turns queries and keys into weights of values.

A part of `Attention`: weights(query, key, value, mask, bias, scale) reads
[B, T, N, V] from query [B, T, N, H], key [B, S, K, H] and value [B, S, K, V].

  entmax     o_t = sum_s entmax_alpha_n(q_t . k_s / sqrt(H))_s v_s,
             alpha_n = 1 + sigmoid(a_n)          Correia et al. 1909.00015
  additive   e_ts = w . tanh(W_q q_t + W_k k_s)  Bahdanau et al. 1409.0473
  luong      e_ts = q_t^T W k_s                  Luong et al. 1508.04025

Entmax learns alpha for every head n: between softmax, alpha = 1, and sparsemax,
alpha = 2, a weight is zero where a logit is low. O(T^2), dense. The other two,
o_t = sum_s softmax_s(e_ts) v_s, come from recurrent translators, which knew
positions: none are added by default. O(T^2), and additive holds O(T^2 H)
numbers; see `ops.softmax.score_functions`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.mixers.softmax.heads import Heads
from efficient_attn.layers.param import fan_in_normal, param, value_of
from efficient_attn.ops import masks
from efficient_attn.ops.softmax import score_functions
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.ops.softmax.logits import attend_logits
from efficient_attn.ops.softmax.normalizers import entmax, normalized_attention
from efficient_attn.values import PositiveFloat


class Weights(nnx.Module):
  """A part of `Attention`; a subclass has `average`.

  Attributes:
    takes_bias: whether numbers may be added to the logits.
    parts_of_a_head: how many there are, each rotated by itself.
  """

  takes_bias = True
  parts_of_a_head = 1

  def __call__(self, query, key, value, mask, bias, scale):
    """Returns what every query head reads, [B, T, N, V]."""
    return self.average(query, key, value, mask, bias, scale)

  def average(self, query, key, value, mask, bias, scale):
    """Returns the weighted values, [B, T, N, V], linear in them."""
    raise NotImplementedError


class Softmax(Weights):
  """softmax(q . k), with a learned logit per head in its sum if `sinks`."""

  def __init__(
    self,
    *,
    heads: Heads,
    rngs: nnx.Rngs,
    sinks: bool = False,
    logits_soft_cap: PositiveFloat | None = None,
    implementation: str | None = None,
  ):
    self.sinks = param(jnp.zeros(heads.query), ('heads',)) if sinks else None
    self.options = dict(
      logits_soft_cap=logits_soft_cap, implementation=implementation
    )

  def average(self, query, key, value, mask, bias, scale):
    """Reads shard by shard."""
    sinks = self.sinks
    if sinks is not None:
      sinks = value_of(sinks, jnp.promote_types(query.dtype, jnp.float32))

    def op(query, key, value, mask, bias, sinks):
      return attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        sinks=sinks,
        scale=scale,
        **self.options,
      )

    heads = 'BTKH' if key.shape[2] > 1 else 'BT_H'  # MQA: on every device
    letters = masks.letters(mask), masks.letters(bias)
    op = sharding.local_op(op, ('BTNH', heads, heads, *letters, 'N'), 'BTNV')
    return op(query, key, value, mask, bias, sinks)


class Entmax(Weights):
  """alpha-entmax(q . k) with 1 < alpha < 2 learned for every head."""

  def __init__(self, *, heads: Heads, rngs: nnx.Rngs):
    start = jnp.zeros(heads.query)
    self.alpha = param(start, ('heads',), weight_decay=False)

  def average(self, query, key, value, mask, bias, scale):
    """Reads shard by shard."""

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
        scale=scale,
      )

    letters = 'N', masks.letters(mask), masks.letters(bias)
    op = sharding.local_op(op, ('BTNH', 'BTKH', 'BTKV', *letters), 'BTNV')
    return op(query, key, value, value_of(self.alpha, jnp.float32), mask, bias)


class ScoreFunction(Weights):
  """softmax(score(q, k)) with learned arrays for each head, [N, *shape]."""

  takes_bias = False

  def __init__(self, heads: Heads, rngs: nnx.Rngs, *shapes: tuple[int, ...]):
    def matrix(*shape):
      value = fan_in_normal()(rngs.params(), (heads.query, *shape), shape[0])
      axes = ('heads',) + (None,) * len(shape)
      return param(value, axes, weight_decay=True)

    self.params = nnx.List(matrix(*shape) for shape in shapes)

  def average(self, query, key, value, mask, bias, scale):
    """Reads shard by shard; the scores are not scaled."""
    assert bias is None, 'scores of this function have no bias'

    def op(query, key, value, mask, params):
      group = query.shape[2] // key.shape[2]
      key, value = (
        jnp.repeat(x.astype(query.dtype), group, axis=2) for x in (key, value)
      )
      if mask is not None:
        mask = mask.dense(query.shape[1], key.shape[1])
      logits = self.score(query, key, *params)
      return attend_logits(logits, value, mask=mask)

    params = [value_of(p, query.dtype) for p in self.params]
    layouts = ['N' + 'HA'[: p.ndim - 1] for p in params]
    op = sharding.local_op(
      op, ('BTNH', 'BTKH', 'BTKV', masks.letters(mask), layouts), 'BTNV'
    )
    return op(query, key, value, mask, params)


class Additive(ScoreFunction):
  """e_ts = w . tanh(W_q q_t + W_k k_s)."""

  score = staticmethod(score_functions.additive)

  def __init__(self, *, heads: Heads, rngs: nnx.Rngs):
    dim = heads.dim
    super().__init__(heads, rngs, (dim, dim), (dim, dim), (dim,))


class Luong(ScoreFunction):
  """e_ts = q_t^T W k_s."""

  score = staticmethod(score_functions.general)

  def __init__(self, *, heads: Heads, rngs: nnx.Rngs):
    super().__init__(heads, rngs, (heads.dim, heads.dim))
