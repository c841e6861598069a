"""SeerAttention (Gao et al. 2410.13276): blocks chosen by a learned gate.

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the top_k blocks of t
  score_ti = rope(W_q q_t) . rope(W_k [max; min; mean]_{s in i} k_s) / sqrt(H)

A gate per group of heads, over detached queries and keys before their rotation;
an encoder takes the mean of q over blocks of queries, a decoder single queries,
its own block and those before it, as SeerAttention-R (2506.08889). The gate
learns from the divergence of its softmax over the chosen blocks from the weight
of the attention on them, which is added to the gradient of the model's loss;
see `ops.routed.seer`. O(T top_k block_size) and O(T^2 / block_size) for the
gate. The cache holds every past key and value, and the pools of every block.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.layers.cache import recall
from efficient_attn.layers.mixers.routed.heads import GroupedHeads, attach
from efficient_attn.layers.param import fan_in_normal, param, value_of
from efficient_attn.ops.pooling import block_means
from efficient_attn.ops.positions import rotary
from efficient_attn.ops.routed.seer import pools, seer_attention
from efficient_attn.values import Positive


class Seer(GroupedHeads):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self, *, block_size: Positive = 64, top_k: Positive = 16, **options
  ):
    super().__init__(**options)
    heads, dim = self.kv_heads

    def matrix(width):
      init = fan_in_normal()
      weight = init(options['rngs'].params(), (heads, width, dim), width)
      return param(weight, ('heads', None, None), weight_decay=True)

    self.gate_query = matrix(self.heads[0] // heads * dim)
    self.gate_key = matrix(3 * dim)
    self.block_size = block_size
    self.top_k = top_k

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    (plain, plain_key, value), _ = self.qkv(x)
    rotate = self.rotation(x, context, cache)
    (key, value), after, offset = recall(
      context, cache, key=rotate(plain_key), value=value
    )
    gates = (value_of(p, x.dtype) for p in (self.gate_query, self.gate_key))
    heads = 'BTNH', 'BTNH', 'BSKH', 'BTKH', 'BSKV', 'N__', 'N__', 'BIK__'
    out = 'BTNV', 'BTN', 'BIK__'
    op = sharding.local_op(self.attend, heads, out, offset='')
    old = cache and cache.state
    o, loss, state = op(
      rotate(plain), plain, key, plain_key, value, *gates, old, offset=offset
    )
    y = attach(self.out(o), jnp.sum(loss, -1))
    return y, after and after.replace(state=state)

  def attend(
    self, query, plain, key, plain_key, value, w_query, w_key, state, *, offset
  ):
    """One shard of heads."""
    length = plain.shape[1]
    plain, plain_key = map(jax.lax.stop_gradient, (plain, plain_key))
    if state is None:
      pooled = pools(plain_key, self.block_size)
    else:
      blocks = (offset + jnp.arange(length)) // self.block_size
      pooled, state = pool_on(
        state, plain_key, blocks, offset + length, self.block_size
      )
    places = offset + jnp.arange(length)
    starts = jnp.arange(pooled.shape[1]) * self.block_size
    if not self.causal:
      plain = block_means(plain, self.block_size).astype(query.dtype)
      places = starts
    groups = *plain.shape[:2], w_query.shape[0], -1
    turn = functools.partial(rotary, base=self.rotary_base)
    gate_query, gate_key = (
      turn(jnp.einsum('btkh,khe->btke', x.astype(weight.dtype), weight), at)
      for x, weight, at in (
        (plain.reshape(groups), w_query, places),
        (pooled, w_key, starts),
      )
    )
    if not self.causal:
      gate_query = jnp.repeat(gate_query, self.block_size, 1)[:, :length]
    out, loss = seer_attention(
      query,
      key,
      value,
      gate_query,
      gate_key,
      block_size=self.block_size,
      top_k=self.top_k,
      causal=self.causal,
      offset=offset,
    )
    return out, loss, state

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    heads, dim = self.kv_heads
    number = -(-max_len // self.block_size)
    empty = jnp.zeros((batch, number, heads, 3, dim))
    empty = empty.at[..., 0, :].set(-jnp.inf).at[..., 1, :].set(jnp.inf)
    return super().init_cache(batch, max_len, dtype, state=empty)


def pool_on(old, key, blocks, length, block_size):
  """Adds keys [B, T, K, H] of `blocks` to pools [B, I, K, 3, H].

  Returns the pools as `ops.routed.seer.pools` does, zeros for blocks of no
  token, and as they are kept, with sums in place of means.
  """
  key = key.astype(old.dtype)
  top = old[..., 0, :].at[:, blocks].max(key)
  low = old[..., 1, :].at[:, blocks].min(key)
  total = old[..., 2, :].at[:, blocks].add(key)
  starts = jnp.arange(old.shape[1]) * block_size
  counts = jnp.clip(length - starts, 0, block_size)[:, None, None]
  pooled = jnp.concatenate([top, low, total / jnp.maximum(counts, 1)], -1)
  pooled = jnp.where(counts > 0, pooled, 0)
  return pooled, jnp.stack([top, low, total], -2)
