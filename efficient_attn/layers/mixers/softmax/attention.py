"""Softmax attention: multi-head, grouped-query and multi-query.

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s       (Vaswani et al. 2017)

With num_kv_heads < num_heads it is GQA (Ainslie et al., 2305.13245), with one
MQA (Shazeer, 1911.02150). The cache holds every past key and value. BERT, GPT-2
and ViT have both `qkv_bias` and `out_bias`, Qwen2 the first.

`gate` multiplies o_t by sigmoid(W_g x_t), one gate for each head or for each
channel (Qiu et al., 2505.06708); `sinks` adds a learned logit per head to the
denominator (gpt-oss); `scale` takes the place of 1 / sqrt(H); `qk_norm` puts a
norm with the options `qk_norms` behind queries and keys; `cosine` makes unit
vectors of them, with a learned temperature per head; `position` chooses a rule
of `layers.position`. A layer with `shared_kv` has only queries and reads the
keys and values of the nearest attention layer before it in the pattern
(cross-layer attention, Brandon et al., 2405.12981); its cache holds nothing.

A row of the method table chooses two parts: a `mask_rule`, who sees whom, and
`weights`, what softmax is above.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.cache import (
  Cursor,
  RecurrentCache,
  positions_of,
  recall,
  restrict,
  token_cache,
  window_cache,
)
from efficient_attn.layers.capture import tap
from efficient_attn.layers.context import Context
from efficient_attn.layers.cosine import ScaledUnit
from efficient_attn.layers.mixer import Mixer, refuse_cache, refuse_segments
from efficient_attn.layers.mixers.softmax.heads import Heads
from efficient_attn.layers.mixers.softmax.mask_rule import MaskRule
from efficient_attn.layers.mixers.softmax.weights import Softmax
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import Projection, value_of
from efficient_attn.layers.position import POSITIONS, T5, Alibi
from efficient_attn.layers.qk_norm import QKNorm
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.rotary import Rotary
from efficient_attn.ops import chunks, masks, scores
from efficient_attn.values import NonNegative, PositiveFloat

# The axes of the gates of a token.
GATES = {'none': (), 'head': ('heads',), 'channel': ('heads', 'head_dim')}
ROTARY, BUCKETS, ALIBI, QK_NORMS = Rotary(), T5(), Alibi(), QKNorm()


class Attention(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    num_kv_heads: NonNegative = 0,
    head_dim: NonNegative = 0,
    qkv_bias: bool = False,
    out_bias: bool = False,
    position: str = 'rotary',
    rotary: Rotary = ROTARY,
    t5: T5 = BUCKETS,
    alibi: Alibi = ALIBI,
    scale: PositiveFloat | None = None,
    qk_norm: bool = False,
    qk_norms: QKNorm = QK_NORMS,
    cosine: bool = False,
    gate: str = 'none',
    shared_kv: bool = False,
    mask_rule=MaskRule,
    weights=Softmax,
  ):
    choose('position', position, POSITIONS)
    gate_axes = choose('gate', gate, GATES)
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
      raise ConfigError(
        f'num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}'
      )
    head_dim = head_dim or d_model // num_heads
    self.kv_heads = (num_kv_heads, head_dim)
    embed = {'embed': d_model}
    axes = {'heads': num_heads, 'head_dim': head_dim}
    if shared_kv:
      self.query = Projection(embed, axes, bias=qkv_bias, rngs=rngs)
    else:
      self.qkv = QKV(
        d_model,
        query=(num_heads, head_dim),
        key=self.kv_heads,
        value=self.kv_heads,
        bias=qkv_bias,
        rngs=rngs,
      )
    self.out = Projection(axes, embed, bias=out_bias, rngs=rngs)
    if cosine and qk_norm:
      raise ConfigError('cosine=True normalises q and k; set qk_norm=False')
    if cosine:
      self.query_norm, self.key_norm = ScaledUnit(num_heads), l2_normalize
    else:
      build = qk_norms.build if qk_norm else lambda *_: None
      self.query_norm = build(num_heads, head_dim)
      self.key_norm = None if shared_kv else build(*self.kv_heads)
    if cosine and scale is not None:
      raise ConfigError(
        f'scale={scale}: cosine=True learns its own; drop one of them'
      )
    if position == 't5':
      self.buckets = t5.table(d_model, num_heads, rngs)
    if gate_axes:
      gates = {axis: axes[axis] for axis in gate_axes}
      self.gate = Projection(embed, gates, rngs=rngs)
    else:
      self.gate = None
    heads = Heads(d_model, num_heads, *self.kv_heads, causal)
    self.mask_rule = mask_rule(heads=heads, rngs=rngs)
    self.weights = weights(heads=heads, rngs=rngs)
    if not (self.mask_rule.takes_bias and self.weights.takes_bias):
      choose('position', position, dict.fromkeys(('none', 'rotary')))
    self.shared_kv = shared_kv
    self.shares_keys = self.mask_rule.remembers is None
    self.causal = causal
    self.position, self.t5, self.alibi = position, t5, alibi
    self.rotate = rotary if POSITIONS[position] else None
    self.num_heads = num_heads
    self.scale = 1.0 if cosine else scale

  def check_rows(self, context, cache):
    """Raises where it, or its mask rule, cannot mix such rows."""
    super().check_rows(context, cache)
    if not self.mask_rule.packs:
      name = f'a bidirectional {type(self.mask_rule).__name__}'
      refuse_segments(name, context)

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    y, cache, _ = self.mix_sharing(x, context, cache, None)
    return y, cache

  def mix_sharing(self, x, context, cache, shared):
    """Mixes tokens in a pattern of layers that share keys and values.

    `shared` is what the attention layer before left, empty for the first: its
    keys and values, and where its cache stood before these tokens.
    """
    if self.shared_kv:
      if not shared:
        raise ValueError(
          'shared_kv=True: a layer without keys needs a pattern with an'
          ' attention layer before it'
        )
      key, value, cursor = (shared[k] for k in ('key', 'value', 'cursor'))
      positions = positions_of(context, cursor, x.shape[1])
      query = self.turn(self.query(x), self.query_norm, positions)
      query = tap('query', query)
      offset = 0 if cursor is None else cursor.length
    else:
      cursor = cache and cache.cursor
      query, key, value = self.project(x, context, cursor)
      (key, value), cache, offset = recall(context, cache, key=key, value=value)
      shared = dict(key=key, value=value, cursor=cursor)
    T, S = x.shape[1], key.shape[1]
    rule = self.mask_rule.mask(S)
    mask = self.mask(rule, context, cursor, offset, T, S)
    bias = self.bias(offset, context, cursor, T, S)
    o = self.weights(query, key, value, mask, bias, self.scale)
    return self.output(o, x), cache, shared

  def project(self, x, context: Context, cursor: Cursor | None, qkv=None):
    """Returns query, key and value of the new tokens, turned."""
    (query, key, value), _ = (qkv or self.qkv)(x)
    positions = positions_of(context, cursor, x.shape[1])
    query = self.turn(query, self.query_norm, positions)
    key = self.turn(tap('raw_key', key), self.key_norm, positions)
    return tap('query', query), tap('key', key), tap('value', value)

  def turn(self, heads, norm, positions):
    """Normalises and rotates heads [B, T, N, H], as far as that is asked."""
    heads = heads if norm is None else norm(heads)
    if self.rotate is None:
      return heads
    parts = jnp.split(heads, self.weights.parts_of_a_head, axis=-1)
    return jnp.concatenate([self.rotate(p, positions) for p in parts], axis=-1)

  def places(self, context, cursor, offset, T: int, S: int):
    """Counts the keys from the first token of their row, [#B, S].

    Behind a cache the first key may be padding, or no longer the first token.
    """
    if cursor is None and context.segment_ids is None:
      return jnp.arange(S)[None]
    if cursor is None:
      return chunks.segment_positions(context.segment_ids)
    start = cursor.advance(T, context).start
    places = cursor.length - offset + jnp.arange(S)[None]
    return places if start is None else places - start[:, None]

  def mask(self, mask, context, cursor, offset, T: int, S: int):
    """Returns the mask of T queries and S keys by the rule `mask`.

    Query 0 has place `offset` among the keys.
    """
    if isinstance(mask, masks.Window):
      mask = dataclasses.replace(mask, offset=offset)
    elif mask is not None and cursor is not None:
      places = self.places(context, cursor, offset, T, S)
      rows = places[:, :1] + offset + jnp.arange(T)
      mask = masks.At(mask, rows, places)
    mask = restrict(mask, context, cursor, T, offset, S)
    if self.causal:
      causal = masks.Causal(offset)
      mask = causal if mask is None else causal & mask
    return mask

  def bias(self, offset, *where) -> scores.Score | None:
    """Returns what is added to the logits of queries from `offset` on.

    A rule may ask `where` the rows begin: the arguments of `places`.
    """
    found = self.mask_rule.bias(offset)
    if self.position == 'alibi':
      slopes = jnp.asarray(scores.alibi_slopes(self.num_heads))
      if self.alibi.scaled:
        slopes *= self.kv_heads[1] ** -0.5
      rule = scores.Alibi(slopes, offset)
    elif self.position == 't5':
      table = value_of(self.buckets, jnp.float32)
      rule = scores.T5(table, not self.causal, self.t5.distance, offset)
    else:
      return found
    return rule if found is None else found + rule

  def output(self, o, x):
    """Gates the heads o [B, T, N, V] by the input x and projects them."""
    if self.gate is not None:
      gate = jax.nn.sigmoid(self.gate(x))
      o = o * (gate if gate.ndim == o.ndim else gate[..., None])
    return self.out(o)

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` keys and values, or for those in sight."""
    if not self.causal:
      refuse_cache(type(self).__name__)
    if self.shared_kv:
      return RecurrentCache(state=())
    widths = dict(key=self.kv_heads, value=self.kv_heads)
    if self.mask_rule.remembers is None:
      return token_cache(batch, max_len, dtype, **widths)
    return window_cache(batch, self.mask_rule.remembers, dtype, **widths)
