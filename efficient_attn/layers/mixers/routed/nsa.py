"""NSA, native sparse attention (Yuan et al. 2502.11089).

  o_t = sum_c g^c_t Attention(q_t, K^c, V^c),   g_t = sigmoid(W_g x_t) per head

over c = compressed tokens, selected blocks and a window, each with keys and
values of its own; see `ops.routed.nsa`. The sizes are the published ones. The
paper leaves open the MLPs: here one hidden layer of 2 H for the keys and one
for the values, shared by the heads; that of the gates: here one layer; and the
positions: here rotary in the selected and the window branch, while the
compressed one has the places inside a block only. The cache holds every past
key and value of the selected branch, the compressed ones, and the last few of
the other two branches.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.cache import recall
from efficient_attn.layers.mixers.routed.heads import GroupedHeads
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  value_of,
)
from efficient_attn.ops.routed import nsa
from efficient_attn.values import Positive


class Compress(nnx.Module):
  """The parameters that `ops.routed.nsa.compress` uses."""

  def __init__(self, size: int, head_dim: int, *, rngs: nnx.Rngs):
    init, hidden = fan_in_normal(), 2 * head_dim
    places = 0.02 * jax.random.normal(rngs.params(), (size, head_dim))
    self.places = param(places, (None, None), weight_decay=False)
    up = init(rngs.params(), (size, head_dim, hidden), size * head_dim)
    self.up = param(up, (None, None, None), inputs=2)
    down = init(rngs.params(), (hidden, head_dim), hidden)
    self.down = param(down, (None, None), inputs=1)

  def weights(self, dtype) -> nsa.Compressor:
    """Returns them in `dtype`."""
    return nsa.Compressor(
      *(value_of(p, dtype) for p in (self.places, self.up, self.down))
    )


class NSA(GroupedHeads):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    compress_size: Positive = 32,
    compress_stride: Positive = 16,
    block_size: Positive = 64,
    top_k: Positive = 16,
    window: Positive = 512,
    **options,
  ):
    super().__init__(**options)
    rngs, d_model = options['rngs'], options['d_model']
    pairs = {'heads': self.kv_heads[0], 'pair': 2, 'dim': self.kv_heads[1]}
    self.compressed, self.window = (
      Projection({'embed': d_model}, pairs, rngs=rngs) for _ in range(2)
    )
    self.compress = nnx.List(
      Compress(compress_size, self.kv_heads[1], rngs=rngs) for _ in range(2)
    )
    self.gate = Projection(
      {'embed': d_model},
      {'heads': options['num_heads'], 'branch': 3},
      rngs=rngs,
    )
    self.sizes = nsa.Sizes(
      compress_size, compress_stride, block_size, top_k, window
    )
    nsa.check_sizes(self.sizes)

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    rotate = self.rotation(x, context, cache)
    (plain_query, key, value), _ = self.qkv(x)
    near = self.window(x)
    near = jnp.stack([rotate(near[..., 0, :]), near[..., 1, :]], -2)
    gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
    mlps = [mlp.weights(x.dtype) for mlp in self.compress]
    (key, value), after, offset = recall(
      context, cache, key=rotate(key), value=value
    )
    heads = 'BTNH', 'BTNH', 'BSKH', 'BSKV', 'BTK__', 'BTK__', 'BTN_'
    layouts = (*heads, lambda leaf: '_' * leaf.ndim, 'BSK__')
    op = sharding.local_op(self.attend, layouts, ('BTNV', 'BSK__'), offset='')
    query, state = rotate(plain_query), cache and cache.state
    o, state = op(
      *(query, plain_query, key, value, self.compressed(x), near, gates),
      *(mlps, state),
      offset=offset,
    )
    return self.out(o), after and after.replace(state=state)

  def attend(
    self, query, plain, key, value, tokens, near, gates, mlps, state, *, offset
  ):
    """One shard of heads; `tokens` and `near` are pairs [B, T, K, 2, H]."""
    length, sizes, behind = query.shape[1], self.sizes, 0
    if state is None:
      short = compress_pairs(nsa.frames(tokens, sizes), mlps)
    else:
      behind = sizes.window - 1
      tokens, near = (
        jnp.concatenate([state[name], new.astype(state[name].dtype)], 1)
        for name, new in (('tokens', tokens), ('near', near))
      )
      found, index, there = nsa.new_frames(tokens, length, offset, sizes)
      short = state['short']
      short = short.at[:, jnp.where(there, index, short.shape[1])].set(
        compress_pairs(found, mlps).astype(short.dtype), mode='drop'
      )
      state = dict(
        tokens=tokens[:, length:], near=near[:, length:], short=short
      )
    out = nsa.nsa_attention(
      query,
      plain,
      split(short),
      (key, value),
      split(near),
      gates,
      sizes=sizes,
      offset=offset,
      behind=behind,
    )
    return out, state

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    sizes, (heads, dim) = self.sizes, self.kv_heads
    lengths = dict(
      tokens=sizes.compress_size - 1,
      near=sizes.window - 1,
      short=-(-max_len // sizes.compress_stride),
    )
    state = {
      name: jnp.zeros((batch, length, heads, 2, dim), dtype)
      for name, length in lengths.items()
    }
    return super().init_cache(batch, max_len, dtype, state=state)


def compress_pairs(frames, mlps):
  """Frames [B, I, L, K, 2, H] to pairs [B, I, K, 2, H]."""
  pairs = [nsa.compress(frames[..., i, :], mlp) for i, mlp in enumerate(mlps)]
  return jnp.stack(pairs, -2)


def split(pairs):
  """Keys and values of pairs [B, S, K, 2, H]."""
  return pairs[..., 0, :], pairs[..., 1, :]
