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
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.factorized_attention import (
  fixed_attention,
  strided_attention,
)
from efficient_attn.values import Positive

KINDS = {'strided': strided_attention, 'fixed': fixed_attention}


class SparseTransformer(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    kind: str = 'fixed',
    stride: Positive = 128,
    summary: Positive = 8,
    **options,
  ):
    super().__init__(**options)
    choose('kind', kind, KINDS)
    if kind == 'fixed' and not 0 < summary <= stride:
      raise ConfigError(
        f'summary={summary} must be between 1 and stride={stride}'
      )
    self.kind = kind
    self.sizes = dict(stride=stride)
    if kind == 'fixed':
      self.sizes |= dict(summary=summary)

  mix_sharing = None  # its keys and values are not those of attention

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    whole = cache is None and context.segment_ids is None
    if not whole or self.sinks is not None or self.bias(0) is not None:
      return Attention.mix_sharing(self, x, context, cache, None)[:2]

    def op(query, key, value):
      return KINDS[self.kind](
        query, key, value, causal=self.causal, **self.sizes, **self.options
      )

    op = sharding.local_op(op, ('BTNH', 'BTKH', 'BTKV'), 'BTNV')
    return self.output(op(*self.project(x, context.positions, None)), x), None

  def pattern(self, length: int) -> masks.Mask:
    """Both halves."""
    rule = masks.Fixed if self.kind == 'fixed' else masks.Strided
    return rule(**self.sizes)
