"""Forgetting Transformer, FoX (Lin et al. 2503.02130): softmax that forgets.

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H) + sum_{l in (s, t]} log f_l) v_s
  f_t = sigmoid(w_f x_t + b_f)                                       per head

in the published "Pro" block: no positions; keys and values are first mixed
with those of the token before, k_t <- a_t k_{t-1} + (1 - a_t) k_t with
a_t = sigmoid(w_a x_t) per head; q and k are normalised; the output is
normalised per head and gated by sigmoid(W_g x). The cache holds every past
key, value and log f.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.cache import append, empty_keys
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import GatedOutput
from efficient_attn.ops import chunks, masks, scores
from efficient_attn.ops.softmax.attention import attention


class FoX(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    implementation: str | None = None,
  ):
    del causal  # always True, as the row says
    heads = (num_heads, d_model // num_heads)
    embed, each = {'embed': d_model}, {'heads': num_heads}
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    self.forget = Projection(embed, each, bias=True, rngs=rngs)
    self.key_shift = Projection(embed, each, rngs=rngs)
    self.value_shift = Projection(embed, each, rngs=rngs)
    self.query_norm = RMSNorm(heads[1])
    self.key_norm = RMSNorm(heads[1])
    self.out = GatedOutput(
      d_model, *heads, rngs=rngs, activation=jax.nn.sigmoid
    )
    self.heads = heads
    self.implementation = implementation

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    (query, key, value), _ = self.qkv(x)
    past = cache or {}
    key, last_key = shift(
      key, self.key_shift(x), context.segment_ids, past.get('last_key')
    )
    value, last_value = shift(
      value, self.value_shift(x), context.segment_ids, past.get('last_value')
    )
    query, key = self.query_norm(query), self.key_norm(key)
    log_forget = jax.nn.log_sigmoid(self.forget(x).astype(jnp.float32))
    offset = 0
    if cache is not None:
      if context.segment_ids is not None:
        raise NotImplementedError('a cache needs unpacked sequences')
      offset = cache['length']
      key = append(cache['key'], key, offset)
      value = append(cache['value'], value, offset)
      log_forget = append(cache['log_forget'], log_forget, offset)
      cache = dict(
        key=key,
        value=value,
        log_forget=log_forget,
        last_key=last_key,
        last_value=last_value,
        length=offset + x.shape[1],
      )

    def op(query, key, value, log_forget, mask, offset):
      return attention(
        query,
        key.astype(query.dtype),
        value.astype(query.dtype),
        mask=mask,
        bias=scores.Forget(log_forget, offset),
        implementation=self.implementation,
      )

    mask = masks.Causal(offset)
    if context.segment_ids is not None:
      mask = masks.packed(mask, context.segment_ids)
    layouts = ('BTNH', 'BSNH', 'BSNV', 'BSN', masks.letters(mask))
    op = sharding.local_op(op, (*layouts, ''), 'BTNV')
    o = op(query, key, value, log_forget, mask, jnp.asarray(offset))
    return self.out(o, x), cache

  def init_cache(self, batch: int, max_len: int, dtype) -> dict[str, jax.Array]:
    """Returns room for `max_len` tokens; writing past it is wrong."""
    last = (batch, *self.heads)
    return empty_keys(batch, max_len, self.heads, dtype) | dict(
      log_forget=jnp.zeros((batch, max_len, self.heads[0])),
      last_key=jnp.zeros(last, dtype),
      last_value=jnp.zeros(last, dtype),
    )


def shift(x, gate, segment_ids, last):
  """Mixes x [B, T, N, H] with the token before by sigmoid(gate [B, T, N])."""

  def op(x, gate, segment_ids, last):
    last = jnp.zeros_like(x[:, 0]) if last is None else last.astype(x.dtype)
    previous = jnp.concatenate([last[:, None], x[:, :-1]], axis=1)
    if segment_ids is not None:
      starts = chunks.segment_starts(segment_ids)[..., None, None]
      previous = jnp.where(starts, 0, previous)
    weight = jax.nn.sigmoid(gate)[..., None]
    return weight * previous + (1 - weight) * x, x[:, -1]

  op = sharding.local_op(op, ('BTNH', 'BTN', 'BT', 'BNH'), ('BTNH', 'BNH'))
  return op(x, gate, segment_ids, last)
