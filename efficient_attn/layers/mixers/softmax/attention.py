"""Softmax attention: multi-head, grouped-query and multi-query.

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s       (Vaswani et al. 2017)

With num_kv_heads < num_heads it is GQA (Ainslie et al., 2305.13245), with one
MQA (Shazeer, 1911.02150). The cache holds every past key and value. BERT, GPT-2
and ViT have both `qkv_bias` and `out_bias`, Qwen2 the first.

`gate` multiplies o_t by sigmoid(W_g x_t), one gate for each head or for each
channel (Qiu et al., 2505.06708); `sinks` adds a learned logit per head to the
denominator (gpt-oss); `cosine` makes unit vectors of q and k, with a learned
temperature per head; position 't5' learns a bias for each head and bucket of
distances (Raffel et al., 1910.10683). A layer with `shared_kv` has only queries
and reads the keys and values of the nearest attention layer before it in the
pattern (cross-layer attention, Brandon et al., 2405.12981); its cache holds
nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.cache import (
  check_cacheable,
  empty_keys,
  extend,
  next_positions,
)
from efficient_attn.layers.cosine import ScaledUnit
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.norm import RMSNorm, l2_normalize
from efficient_attn.layers.param import Projection, param, use
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops import masks, scores
from efficient_attn.ops.positions import rotary
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import NonNegative, Positive, PositiveFloat, Share

# Whether queries and keys are rotated.
POSITIONS = {'none': False, 'rotary': True, 'alibi': False, 't5': False}
# The axes of the gates of a token.
GATES = {'none': (), 'head': ('heads',), 'channel': ('heads', 'head_dim')}


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
    rotary_base: PositiveFloat = 10_000.0,
    rotary_fraction: Share = 1.0,
    t5_buckets: Positive = 32,
    t5_distance: Positive = 128,
    qk_norm: bool = False,
    cosine: bool = False,
    gate: str = 'none',
    sinks: bool = False,
    shared_kv: bool = False,
    logits_soft_cap: PositiveFloat | None = None,
    implementation: str | None = None,
  ):
    choose('position', position, POSITIONS)
    gate_axes = choose('gate', gate, GATES)
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
      raise ConfigError(
        f'num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}'
      )
    head_dim = head_dim or d_model // num_heads
    kv_heads = (num_kv_heads, head_dim)
    embed = {'embed': d_model}
    heads = {'heads': num_heads, 'head_dim': head_dim}
    if shared_kv:
      self.query = Projection(embed, heads, bias=qkv_bias, rngs=rngs)
    else:
      self.qkv = QKV(
        d_model,
        query=(num_heads, head_dim),
        key=kv_heads,
        value=kv_heads,
        bias=qkv_bias,
        rngs=rngs,
      )
    self.out = Projection(heads, embed, bias=out_bias, rngs=rngs)
    if cosine and qk_norm:
      raise ConfigError('cosine=True normalises q and k; set qk_norm=False')
    if cosine:
      self.query_norm, self.key_norm = ScaledUnit(num_heads), l2_normalize
    else:
      self.query_norm = RMSNorm(head_dim) if qk_norm else None
      self.key_norm = RMSNorm(head_dim) if qk_norm and not shared_kv else None
    if position == 't5':
      table = d_model**-0.5 * jax.random.normal(
        rngs.params(), (t5_buckets, num_heads)
      )
      self.buckets = param(table, (None, 'heads'))
    if gate_axes:
      gates = {axis: heads[axis] for axis in gate_axes}
      self.gate = Projection(embed, gates, rngs=rngs)
    else:
      self.gate = None
    self.sinks = param(jnp.zeros(num_heads), ('heads',)) if sinks else None
    self.shared_kv = shared_kv
    self.causal = causal
    self.position = position
    self.rotary_base = rotary_base
    self.rotary_fraction = rotary_fraction
    self.num_heads = num_heads
    self.kv_heads = kv_heads
    self.t5_distance = t5_distance
    self.options = dict(
      scale=1.0 if cosine else None,
      logits_soft_cap=logits_soft_cap,
      implementation=implementation,
    )

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    y, cache, _ = self.mix_sharing(x, context, cache, None)
    return y, cache

  def mix_sharing(self, x, context, cache, shared):
    """Mixes tokens in a pattern that shares keys and values.

    `shared` is what the attention layer before left, {} for the first, and the
    third result is for the next.
    """
    positions, segment_ids = context.positions, context.segment_ids
    if self.shared_kv:
      query, key, value, offset = self.join(x, positions, shared)
    else:
      query, key, value = self.project(x, positions, cache)
      if cache is not None:
        self.check_cacheable(segment_ids)
      key, value, cache, offset = extend(cache, key, value)
      if shared is not None:
        shared = cache or dict(key=key, value=value)
    mask = self.pattern(key.shape[1])
    if mask is not None and cache is not None:
      rows = offset + jnp.arange(x.shape[1])
      mask = masks.At(mask, rows[None], jnp.arange(key.shape[1])[None])
    if segment_ids is not None:
      mask = masks.packed(mask, segment_ids)
    if self.causal:
      causal = masks.Causal(offset)
      mask = causal if mask is None else causal & mask
    y = self.attend(query, key, value, mask, offset, x)
    return y, cache, shared

  def pattern(self, length: int) -> masks.Mask | None:
    """Which of `length` keys each query sees, beside causality; None: all."""
    return None

  def check_cacheable(self, segment_ids) -> None:
    """Raises where past keys and values cannot be continued."""
    check_cacheable(self.causal, segment_ids)

  def project(self, x, positions, cache, qkv=None):
    """Returns query, key and value of the new tokens, rotated."""
    (query, key, value), _ = (qkv or self.qkv)(x)
    if positions is None:
      positions = next_positions(cache, x.shape[1])
    query = self.place(query, self.query_norm, positions)
    key = self.place(key, self.key_norm, positions)
    return query, key, value

  def join(self, x, positions, shared):
    """Returns queries, and the keys and values that another layer left."""
    if not shared:
      raise ValueError(
        'shared_kv=True: a layer without keys needs a pattern with an attention'
        ' layer before it'
      )
    offset = 0
    if 'length' in shared:  # the cache of the other layer, with x in it
      offset = shared['length'] - x.shape[1]
    if positions is None:
      positions = offset + jnp.arange(x.shape[1])
    query = self.place(self.query(x), self.query_norm, positions)
    return query, shared['key'], shared['value'], offset

  def place(self, x, norm, positions):
    """Normalises and rotates heads x [B, T, N, H], as far as that is asked."""
    x = x if norm is None else norm(x)
    return self.rotate(x, positions) if POSITIONS[self.position] else x

  def rotate(self, x, positions):
    """Rotates heads x [B, T, N, H] by their positions."""
    return rotary(
      x, positions, base=self.rotary_base, fraction=self.rotary_fraction
    )

  def attend(self, query, key, value, mask, offset, x=None):
    """Attends and projects back to [B, T, D]; gates are read from input x."""
    return self.output(self.read(query, key, value, mask, offset), x)

  def output(self, o, x):
    """Gates the heads o [B, T, N, V] and projects them."""
    if self.gate is not None:
      gate = jax.nn.sigmoid(self.gate(x))
      o = o * (gate if gate.ndim == o.ndim else gate[..., None])
    return self.out(o)

  def bias(self, offset) -> scores.Score | None:
    """What is added to the logits of queries that start at `offset`."""
    if self.position == 'alibi':
      slopes = jnp.asarray(scores.alibi_slopes(self.num_heads))
      return scores.Alibi(slopes, offset)
    if self.position == 't5':
      table = use(self.buckets, jnp.float32)
      return scores.T5(table, not self.causal, self.t5_distance, offset)
    return None

  def read(self, query, key, value, mask, offset, bias=None):
    """Returns what every head reads, [B, T, N, V], shard by shard."""
    if bias is None:
      bias = self.bias(offset)
    sinks = self.sinks
    if sinks is not None:
      sinks = use(sinks, jnp.promote_types(query.dtype, jnp.float32))

    def op(query, key, value, mask, bias, sinks):
      return attention(
        query, key, value, mask=mask, bias=bias, sinks=sinks, **self.options
      )

    heads = 'BTKH' if self.kv_heads[0] > 1 else 'BT_H'  # MQA: on every device
    letters = masks.letters(mask), masks.letters(bias)
    op = sharding.local_op(op, ('BTNH', heads, heads, *letters, 'N'), 'BTNV')
    return op(query, key, value, mask, bias, sinks)

  def init_cache(self, batch: int, max_len: int, dtype) -> dict[str, jax.Array]:
    """Returns room for `max_len` keys and values; writing past it is wrong."""
    if self.shared_kv:
      return {}
    return empty_keys(batch, max_len, self.kv_heads, dtype)
