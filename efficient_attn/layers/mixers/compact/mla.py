"""Multi-head latent attention, MLA (DeepSeek-V2, 2405.04434).

  c^Q_t = norm(W^DQ x_t)         q_t = [W^UQ c^Q_t; rope(W^QR c^Q_t)]   per head
  c_t   = norm(W^DKV x_t)        k_t = [W^UK c_t;   rope(W^KR x_t)]
  o_t   = sum_s softmax_s(q_t . k_s / sqrt(H_N + H_R)) W^UV c_s

with one rotary key W^KR x for all heads. The cache holds the latent c and the
rotary key: kv_rank + rope_dim numbers a token, whatever the number of heads.
Expanded, keys and values are made of the latent, O(S N kv_rank (H_N + V)), and
attended to as usual. Absorbed, W^UK joins the query and W^UV the output:

  o_t = W^UV sum_s softmax_s([W^UK^T q^N_t; q^R_t] . [c_s; k^R_s]) c_s

is attention to one head, shared by all, of width kv_rank + rope_dim: more work
a pair of tokens, but no expansion of the past.
"""

import math
from typing import Annotated

import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.mixers.compact.memory import Compact
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import Projection
from efficient_attn.layers.rotary import Rotary, Scaling
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import NonNegative, OneOf


class MLA(Compact):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  The ranks and widths default to those of the paper, where a head without
  positions has H = nope_dim channels: kv_rank 4 H, rope_dim H / 2, value_dim H,
  and q_rank 0.3 D; with q_rank=0 queries are not compressed. `absorbed=None`
  takes the form with fewer operations: expanded to train, absorbed to decode.
  With position='none', as in Kimi Linear, the rotary parts do not rotate. YaRN
  with an mscale_all_dim scales the logits, too, see `scale_of`.
  """

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    q_rank: NonNegative | None = None,
    kv_rank: NonNegative = 0,
    nope_dim: NonNegative = 0,
    rope_dim: NonNegative = 0,
    value_dim: NonNegative = 0,
    position: Annotated[str, OneOf(('rotary', 'none'))] = 'rotary',
    rotary: Rotary = Rotary(),  # noqa: B008
    absorbed: bool | None = None,
    implementation: str | None = None,
  ):
    nope_dim = nope_dim or d_model // num_heads
    rope_dim = rope_dim or max(nope_dim // 4 * 2, 2)
    value_dim = value_dim or nope_dim
    kv_rank = kv_rank or 4 * nope_dim
    if q_rank is None:
      q_rank = max(3 * d_model // 10, 1)
    embed, rank = {'embed': d_model}, {'rank': kv_rank}
    queries = {'heads': num_heads, 'head_dim': nope_dim + rope_dim}
    values = {'heads': num_heads, 'head_dim': value_dim}
    if q_rank:
      self.query_down = Projection(embed, {'rank': q_rank}, rngs=rngs)
      self.query_norm = RMSNorm(q_rank)
      self.query_up = Projection({'rank': q_rank}, queries, rngs=rngs)
    else:
      self.query_down = self.query_norm = None
      self.query_up = Projection(embed, queries, rngs=rngs)
    self.kv_down = Projection(embed, rank, rngs=rngs)
    self.kv_norm = RMSNorm(kv_rank)
    self.rotary_key = Projection(embed, {'head_dim': rope_dim}, rngs=rngs)
    self.key_up = Projection(rank, queries | {'head_dim': nope_dim}, rngs=rngs)
    self.value_up = Projection(rank, values, rngs=rngs)
    self.out = Projection(values, embed, rngs=rngs)
    self.causal = causal
    self.widths = dict(latent=(kv_rank,), rotary_key=(rope_dim,))
    self.rotary = rotary if position == 'rotary' else None
    self.absorbed = absorbed
    scale = (nope_dim + rope_dim) ** -0.5
    if self.rotary is not None:
      scale *= scale_of(self.rotary.scaling)
    self.options = dict(scale=scale, implementation=implementation)

  def project(self, x, positions):
    """Returns queries [B, T, N, nope + rope], the latent and rotary key."""
    query = x
    if self.query_down is not None:
      query = self.query_norm(self.query_down(x))
    query = self.query_up(query)
    key = self.rotary_key(x)
    if self.rotary is not None:
      nope, rope = jnp.split(query, [self.key_up.weight.shape[-1]], axis=-1)
      rope = self.rotary(rope, positions)
      query = jnp.concatenate([nope, rope], axis=-1)
      key = self.rotary(key[:, :, None], positions)[:, :, 0]  # one head
    return query, dict(latent=self.kv_norm(self.kv_down(x)), rotary_key=key)

  def attend(self, query, memory, mask):
    """Attends to the latent, or to the keys and values made of it."""
    latent, key = memory['latent'], memory['rotary_key']
    absorbed = self.absorbed
    if absorbed is None:
      absorbed = self.absorbing_is_cheaper(query.shape[1], key.shape[1])
    form = attend_absorbed if absorbed else attend_expanded

    def op(query, latent, key, key_up, value_up, mask):
      options = dict(mask=mask, **self.options)
      return form(query, latent, key, key_up, value_up, **options)

    layouts = ('BTNH', 'BSR', 'BSH', 'RNH', 'RNV', masks.letters(mask))
    op = sharding.local_op(op, layouts, 'BTNV')
    key_up, value_up = (
      p.matrix(query.dtype) for p in (self.key_up, self.value_up)
    )
    return self.out(op(query, latent, key, key_up, value_up, mask))

  def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
    """Compares the products a head takes in the two forms, but for W^KR."""
    rank, _, nope_dim = self.key_up.weight.shape
    width = nope_dim + self.value_up.weight.shape[-1]
    expanded = keys * rank * width + queries * keys * width
    absorbed = queries * rank * width + queries * keys * 2 * rank
    return absorbed < expanded


def scale_of(scaling: Scaling | None) -> float:
  """Returns the factor of the logits by which YaRN with mscales changes them.

  It is (0.1 mscale_all_dim log(factor) + 1)^2, as in DeepSeek-V2.
  """
  if scaling is None or not scaling.mscale_all_dim:
    return 1.0
  grown = 0.1 * scaling.mscale_all_dim * math.log(max(scaling.factor, 1)) + 1
  return grown**2


def attend_expanded(query, latent, rotary_key, key_up, value_up, **options):
  """Attention to the keys and values of every head."""
  key = jnp.einsum('bsr,rnh->bsnh', latent, key_up)
  shared = rotary_key[:, :, None]
  shared = jnp.broadcast_to(shared, (*key.shape[:3], shared.shape[-1]))
  key = jnp.concatenate([key, shared], axis=-1)
  value = jnp.einsum('bsr,rnv->bsnv', latent, value_up)
  return attention(query, key, value, **options)


def attend_absorbed(query, latent, rotary_key, key_up, value_up, **options):
  """Attention to one head, the latent and the rotary key themselves."""
  nope, rope = jnp.split(query, [key_up.shape[-1]], axis=-1)
  query = jnp.concatenate(
    [jnp.einsum('btnh,rnh->btnr', nope, key_up), rope], axis=-1
  )
  key = jnp.concatenate([latent, rotary_key], axis=-1)
  o = attention(query, key[:, :, None], latent[:, :, None], **options)
  return jnp.einsum('btnr,rnv->btnv', o, value_up)
