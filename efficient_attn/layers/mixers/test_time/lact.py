"""LaCT (Zhang et al. 2505.23884): one update per chunk of thousands of tokens.

  o_t = sum_{s in window} softmax_s(q_t . k_s / sqrt(H)) v_s
        + silu(g_t) RMSNorm(f(q'_t; W)),  f(x) = W_2 (silu(W_1 x) * (W_3 x))

q, k, v are shared: q' and k' of the fast weights are l2norm(silu(.)) of q and
k with a scale and an offset per channel, rotated as q and k are, v' = silu(v).
W is what the chunks before the token's left behind, trained on -f(k') . v'
with rates softplus(.) near 0.001 per token, head and matrix and momentum
sigmoid(.); see `ops.large_chunk_fast_weights`. The sliding window sees what
happens inside a chunk ("shifted block causal"). The fast weights have few, wide
heads.

The defaults are those of the published configuration of language models of
760M parameters: W_1 and W_3 start, to have few parameters, as matrices of rank
`rank` plus I / 2; 0 learns all of them. With `muon` updates are
orthogonalised, the paper's other variant, which magnifies rounding errors as
it does small singular values: up to 490 times. `tuned_muon` has the released
code's coefficients for each of its steps, otherwise Jordan's.

Norms differ from the released code in their epsilon: q' and k' have
sqrt(|x|^2 + 1e-6), not |x| + 1e-5, and the norms of weights none. Muon runs in
float32, there in bfloat16.

An encoder makes one update with all tokens, then all read it; its window
reaches window // 2 tokens to each side.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.cache import (
  WindowCache,
  positions_of,
  recall,
  restrict,
)
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.mixers.test_time.fast_mlp import (
  own_state,
  state_layout,
)
from efficient_attn.layers.norm import RMSNorm, l2_normalize
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import LINEAR, Recurrence, Recurrent
from efficient_attn.ops import masks
from efficient_attn.ops.positions import rotary
from efficient_attn.ops.products import exact
from efficient_attn.ops.recurrent.lact import (
  fresh_state,
  large_chunk_fast_weights,
)
from efficient_attn.ops.recurrent.muon import JORDAN, TUNED
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import (
  ChunkSize,
  NonNegative,
  Positive,
  PositiveFloat,
)

BASE_RATE = 0.001


class LaCT(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `chunk_size` is the paper's chunk, a part of the definition; `window` = 0
  takes as many tokens; `fast_heads` = 0 takes the published 4, or what divides
  `num_heads`.
  """

  recurrence = Recurrence(
    large_chunk_fast_weights,
    {
      **LINEAR.inputs,
      'learning_rate': 'BTNR',
      'momentum': 'BTN',
      'weights': 'NHV',
    },
    state=state_layout,
  )
  counts = True

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    fast_heads: NonNegative = 0,
    expand: Positive = 1,
    rank: NonNegative = 32,
    muon: bool = False,
    tuned_muon: bool = True,
    window: NonNegative = 0,
    rotary_base: PositiveFloat = 1_000_000.0,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 2048,
  ):
    fast_heads = fast_heads or math.gcd(num_heads, 4)
    if num_heads % fast_heads:
      raise ConfigError(
        f'fast_heads={fast_heads} does not divide num_heads={num_heads}'
      )
    width = d_model // fast_heads
    heads = {'heads': fast_heads, 'head_dim': width}
    shape = (fast_heads, width)
    self.qkv = QKV(d_model, query=shape, key=shape, value=shape, rngs=rngs)
    # Of the queries and the keys of the fast weights.
    axes = (None, 'heads', 'head_dim')
    self.scale = param(jnp.ones((2, *shape)), axes)
    self.offset = param(jnp.zeros((2, *shape)), axes)
    self.rates = Projection(
      {'embed': d_model},
      {'heads': fast_heads, 'rates': 3},
      bias=True,
      rngs=rngs,
    )
    self.momentum = Projection(
      {'embed': d_model}, {'heads': fast_heads}, bias=True, rngs=rngs
    )
    hidden = expand * width
    self.weights = nnx.List(
      _LowRankStart(fast_heads, *sizes, rank, rngs=rngs)
      if rank and i != 1
      else param(
        jax.random.normal(rngs.params(), (fast_heads, *sizes))
        / math.sqrt(sizes[0]),
        ('heads', None, None),
      )
      for i, sizes in enumerate(
        ((width, hidden), (hidden, width), (width, hidden))
      )
    )
    self.norm = RMSNorm(width, eps=norm_eps)
    self.gate = Projection(
      {'embed': d_model}, {'heads': fast_heads}, bias=True, rngs=rngs
    )
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)
    self.heads = tuple(split_heads(d_model, num_heads).values())
    self.window = window or chunk_size
    self.rotary_base = rotary_base
    self.causal = causal
    self.options = dict(
      use_muon=muon,
      muon_steps=TUNED if tuned_muon else JORDAN,
      chunk_size=chunk_size,
      bidirectional=not causal,
    )

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    positions = positions_of(context, past.cursor, x.shape[1])
    qkv, _ = self.qkv(x)
    near, tails = self._attend(*qkv, positions, context, past)
    far, state = self._recall(x, *qkv, positions, context, past)
    gate = jax.nn.silu(self.gate(x))[..., None]
    return self.out(near + gate * self.norm(far)), state, tails

  def _recall(self, x, q, k, v, positions, context, past):
    """Reads and trains the fast weights."""
    scale, offset = (
      value_of(self.scale, q.dtype),
      value_of(self.offset, q.dtype),
    )
    q, k = (
      l2_normalize(jax.nn.silu(y * scale[i] + offset[i]))
      for i, y in enumerate((q, k))
    )
    width = v.shape[-1]
    q, k = (_regroup(self._rotate(y, positions), width) for y in (q, k))
    rates = self.rates(x).astype(jnp.float32)
    return self.scan(
      context,
      past,
      q=q,
      k=k,
      v=jax.nn.silu(v),
      learning_rate=jax.nn.softplus(rates + math.log(math.expm1(BASE_RATE))),
      momentum=jax.nn.sigmoid(self.momentum(x).astype(jnp.float32)),
      weights=self._weights(),
    )

  def _attend(self, q, k, v, positions, context, past):
    """Returns the reads of narrow heads in the window, and its last tokens."""
    q, k = self._rotate(q, positions), self._rotate(k, positions)
    width, v = v.shape[-1], _regroup(v, self.heads[1])
    left, right = self.window - 1, 0
    if not self.causal:
      left = right = self.window // 2
    window = past.tails and WindowCache(buffers=past.tails, cursor=past.cursor)
    (k, v), window, offset = recall(context, window, key=k, value=v)
    mask = restrict(
      masks.Window(left, right, offset),
      context,
      past.cursor,
      q.shape[1],
      offset,
      k.shape[1],
    )

    def op(q, k, v, mask):
      return attention(q, k, v, mask=mask)

    layouts = ('BTNH', 'BTNH', 'BTNV', masks.letters(mask))
    op = sharding.local_op(op, layouts, 'BTNV')
    return _regroup(op(q, k, v, mask), width), window and window.buffers

  def _rotate(self, x, positions):
    """Rotates wide heads as the narrow ones they consist of."""
    return rotary(_regroup(x, self.heads[1]), positions, base=self.rotary_base)

  def _weights(self):
    return tuple(
      w() if isinstance(w, _LowRankStart) else value_of(w, jnp.float32)
      for w in self.weights
    )

  def init_state(self, batch, max_len, dtype):
    """Returns the initial weights."""
    state = fresh_state(self._weights(), batch, momentum=True)
    return own_state(state, dtype)

  def init_tails(self, batch, dtype):
    """Returns an empty window, of keys and values."""
    shape = (batch, self.window - 1, *self.heads)
    return dict(key=jnp.zeros(shape, dtype), value=jnp.zeros(shape, dtype))


class _LowRankStart(nnx.Module):
  """Matrices left right + I / 2 [N, inputs, outputs] of few parameters."""

  def __init__(
    self, heads: int, inputs: int, outputs: int, rank: int, *, rngs: nnx.Rngs
  ):
    self.left, self.right = (
      param(
        jax.random.normal(rngs.params(), (heads, *sizes))
        / (2 * math.sqrt(fan)),
        ('heads', None, None),
      )
      for sizes, fan in (((inputs, rank), inputs), ((rank, outputs), rank))
    )

  def __call__(self) -> jax.Array:
    """Returns the matrices, float32."""

    def op(left, right):
      linear = exact('nhr,nrv->nhv', left, right)
      return linear + jnp.eye(left.shape[1], right.shape[2]) / 2

    op = sharding.local_op(op, ('NHR', 'NRV'), 'NHV')
    return op(
      value_of(self.left, jnp.float32), value_of(self.right, jnp.float32)
    )


def _regroup(x: jax.Array, width: int) -> jax.Array:
  """Turns heads [B, T, N, H] into more or fewer, `width` wide."""

  def op(x):
    return x.reshape(*x.shape[:2], -1, width)

  return sharding.local_op(op, ('BTNH',), 'BTNH')(x)
