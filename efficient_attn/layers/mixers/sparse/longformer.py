"""Longformer (Beltagy et al. 2004.05150): a window and a few global tokens.

  o_t = sum_{s in W(t) or s or t global} softmax_s(q_t . k_s / sqrt(H)) v_s

W(t) holds window // 2 keys on either side, every `dilation`-th. A global token
sees every token and is seen by every token; the first `num_global` of a
sequence are. With `global_projections`, as published, what a global token
reads comes from projections of its own, q' k' v', of all tokens; the others
read the global tokens through the usual ones. O(T (window + num_global)).
"""

from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops import masks
from efficient_attn.values import NonNegative, Positive


class LocalGlobal(MaskRule):
  """The window and the global tokens."""

  def __init__(
    self,
    *,
    window: Positive = 512,
    dilation: Positive = 1,
    num_global: NonNegative = 1,
    **told,
  ):
    super().__init__(**told)
    self.window = window
    self.dilation = dilation
    self.num_global = num_global

  def mask(self, count):
    """Returns the mask of `count` keys."""
    side = self.window // 2
    near = masks.Window(side, side)
    if self.dilation > 1:
      near = masks.Dilated(side, side, self.dilation)
    return near | masks.Global(tuple(range(self.num_global)))


class Longformer(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self, *, global_projections: bool = False, qkv_bias: bool = False, **options
  ):
    super().__init__(qkv_bias=qkv_bias, **options)
    if global_projections and self.causal:
      raise ConfigError(
        'global_projections=True needs causal=False: in a decoder the first'
        ' tokens have no others to read'
      )
    if global_projections:
      self.global_qkv = QKV(
        options['d_model'],
        query=(self.num_heads, self.kv_heads[1]),
        key=self.kv_heads,
        value=self.kv_heads,
        bias=qkv_bias,
        rngs=options['rngs'],
      )
      self.shares_keys = False
    else:
      self.global_qkv = None

  def mix_sharing(self, x, context, cache, shared):
    """Reads once, or by both projections: each row is in one of the masks."""
    if self.global_qkv is None:
      return super().mix_sharing(x, context, cache, shared)
    first = masks.Leading(self.mask_rule.num_global)
    near = self.mask_rule.mask(x.shape[1]) & ~first
    bias, o = self.bias(0), 0
    for qkv, mask in ((self.qkv, near), (self.global_qkv, first)):
      if context.segment_ids is not None:
        mask = masks.packed(mask, context.segment_ids)
      heads = self.project(x, context, None, qkv)
      o = o + self.weights(*heads, mask, bias, self.scale)
    return self.output(o, x), None, shared
