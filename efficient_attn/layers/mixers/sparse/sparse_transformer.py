"""Sparse Transformer (Child et al. 1904.10509): two sparse halves of a matrix.

  o_t = sum_{s in A(t)} softmax_s(q_t . k_s / sqrt(H)) v_s

  strided   A(t): |t - s| < stride, or t - s a multiple of stride
  fixed     A(t): the block of `stride` tokens of t, and the last `summary` of
            every other block

Strided is for what has a period, as images have; fixed for text. Every head
sees both halves (the paper's merged head). O(T (stride + T / stride)) for whole
sequences, the halves as dense attentions of their own; tile by tile where there
is a cache, a bias, a sink or packed sequences.
"""

from efficient_attn import sharding
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.factorized_attention import (
  fixed_attention,
  strided_attention,
)
from efficient_attn.values import Positive

# The rule of both halves, and their dense attentions.
KINDS = {
  'strided': (masks.Strided, strided_attention),
  'fixed': (masks.Fixed, fixed_attention),
}


class Factorized(MaskRule):
  """Both halves of a factorised matrix."""

  def __init__(
    self,
    *,
    kind: str = 'fixed',
    stride: Positive = 128,
    summary: Positive = 8,
    **told,
  ):
    super().__init__(**told)
    self.rule, self.attend = choose('kind', kind, KINDS)
    self.sizes = dict(stride=stride)
    if kind == 'fixed':
      self.sizes |= dict(summary=summary)
      if summary > stride:
        raise ConfigError(
          f'summary={summary} must be between 1 and stride={stride}'
        )

  def mask(self, count):
    """Returns the mask of `count` keys."""
    return self.rule(**self.sizes)


class SparseTransformer(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def mix_sharing(self, x, context, cache, shared):
    """Mixes whole sequences by their halves, others tile by tile."""
    whole = cache is None and context.segment_ids is None
    placed = self.position in ('alibi', 't5') or self.weights.sinks is not None
    if not whole or placed or self.shared_kv:
      return super().mix_sharing(x, context, cache, shared)

    def op(query, key, value):
      return self.mask_rule.attend(
        query,
        key,
        value,
        causal=self.causal,
        scale=self.scale,
        **self.mask_rule.sizes,
        **self.weights.options,
      )

    heads = self.project(x, context, None)
    op = sharding.local_op(op, ('BTNH', 'BTKH', 'BTKV'), 'BTNV')
    shared = dict(key=heads[1], value=heads[2], cursor=None)
    return self.output(op(*heads), x), None, shared
