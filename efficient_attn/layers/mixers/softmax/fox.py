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
from efficient_attn.layers.cache import (
  TokenCache,
  recall,
  restrict,
  token_cache,
)
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
    gates = self.key_shift(x), self.value_shift(x)
    (key, last_key), (value, last_value) = (
      shift(heads, gate, context.segment_ids, last)
      for heads, gate, last in zip(
        (key, value), gates, cache.state if cache else (None, None), strict=True
      )
    )
    query, key = self.query_norm(query), self.key_norm(key)
    log_forget = jax.nn.log_sigmoid(self.forget(x).astype(jnp.float32))
    (key, value, log_forget), after, offset = recall(
      context, cache, key=key, value=value, log_forget=log_forget
    )
    cursor, (T, S) = cache and cache.cursor, (x.shape[1], key.shape[1])
    mask = restrict(masks.Causal(offset), context, cursor, T, offset, S)

    def op(query, key, value, log_forget, mask, *, offset):
      return attention(
        query,
        key.astype(query.dtype),
        value.astype(query.dtype),
        mask=mask,
        bias=scores.Forget(log_forget, offset),
        implementation=self.implementation,
      )

    layouts = ('BTNH', 'BSNH', 'BSNV', 'BSN', masks.letters(mask))
    op = sharding.local_op(op, layouts, 'BTNV', offset='')
    o = op(query, key, value, log_forget, mask, offset=offset)
    state = last_key, last_value
    return self.out(o, x), after and after.replace(state=state)

  def init_cache(self, batch: int, max_len: int, dtype) -> TokenCache:
    """Returns room for `max_len` tokens; writing past it is wrong."""
    return token_cache(
      batch,
      max_len,
      dtype,
      state=tuple(jnp.zeros((batch, *self.heads), dtype) for _ in range(2)),
      dtypes={'log_forget': jnp.float32},
      key=self.heads,
      value=self.heads,
      log_forget=self.heads[:1],
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
