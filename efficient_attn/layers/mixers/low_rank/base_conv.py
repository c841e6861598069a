"""Gated convolution, BaseConv of Zoology (Arora et al. 2312.04927).

  y = (W x + b) * conv(x)

with a short causal depthwise convolution. It moves tokens by fixed distances,
which is what recall needs beside a memory: pairs (key, value) become one token.
"""

from flax import nnx

from efficient_attn.layers.cache import RecurrentCache
from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import Projection
from efficient_attn.values import Positive


class BaseConv(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    conv_width: Positive = 3,
  ):
    del num_heads, causal  # no heads; causal is always True, as the row says
    channels = {'embed': d_model}
    self.project = Projection(channels, {'gate': d_model}, bias=True, rngs=rngs)
    self.conv = ShortConv(
      {'gate': d_model}, conv_width, bias=True, activation=None, rngs=rngs
    )

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    mixed, tail = self.conv(
      x, segment_ids=context.segment_ids, state=cache and cache.tails
    )
    cache = cache and cache.replace(tails=tail)
    return self.project(x) * mixed, cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the inputs before the first token, zeros."""
    del max_len
    return RecurrentCache(state=None, tails=self.conv.init_state(batch, dtype))
