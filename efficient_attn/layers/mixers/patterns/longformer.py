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
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops import masks
from efficient_attn.values import NonNegative, Positive


class Longformer(Attention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    window: Positive = 512,
    dilation: Positive = 1,
    num_global: NonNegative = 1,
    global_projections: bool = False,
    **options,
  ):
    super().__init__(**options)
    if global_projections and self.causal:
      raise ConfigError(
        'global_projections=True needs causal=False: in a decoder the first'
        ' tokens have no others to read'
      )
    if global_projections:
      heads = (self.num_heads, self.kv_heads[1])
      self.global_qkv = QKV(
        options['d_model'],
        query=heads,
        key=self.kv_heads,
        value=self.kv_heads,
        bias=options.get('qkv_bias', False),
        rngs=options['rngs'],
      )
    else:
      self.global_qkv = None
    self.window = window
    self.dilation = dilation
    self.num_global = num_global

  mix_sharing = None  # its keys and values are not those of attention

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    if self.global_qkv is None:
      return Attention.mix_sharing(self, x, context, cache, None)[:2]
    if cache is not None:
      self.check_cacheable(context.segment_ids)
    # Each row is in one of the masks, and zero where it is not.
    first = masks.Leading(self.num_global)
    o = 0
    for qkv, mask in (
      (self.qkv, self.pattern(x.shape[1]) & ~first),
      (self.global_qkv, first),
    ):
      if context.segment_ids is not None:
        mask = masks.packed(mask, context.segment_ids)
      heads = self.project(x, context.positions, None, qkv)
      o = o + self.read(*heads, mask, 0)
    return self.output(o, x), None

  def pattern(self, length: int) -> masks.Mask:
    """The window and the global tokens."""
    side = self.window // 2
    near = masks.Window(side, side)
    if self.dilation > 1:
      near = masks.Dilated(side, side, self.dilation)
    return near | masks.Global(tuple(range(self.num_global)))
