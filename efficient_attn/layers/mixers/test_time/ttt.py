"""TTT layers (Sun et al. 2407.04620): the state is a model being trained.

  W_t = W - a_i sum_{s <= t} eta_s grad |f(k_s; W) - v_s|^2 / 2, s and t from
  the mini-batch that began at W, where t has place i;     o_t = f(q_t; W_t)
  f(x) = x + LN(W x + b)                                  TTT-Linear
  f(x) = x + LN(W_2 gelu(W_1 x + b_1) + b_2)              TTT-MLP, 4x as wide
  eta_t = base_rate sigmoid(w . x_t + c) / H              per head
  a_i = max(1 / (i + 1) + p_i, 0)                         p learned, from 0

Gradients are taken at the weights before the mini-batch: `chunk_size` is the
paper's inner mini-batch b = 16, a part of the definition. It is the version
for a Transformer backbone: own projections for q, k and v, no convolution,
rotary positions counted inside the mini-batch, and a layer norm over the joined
heads. The initial weights, learned, are N(0, 0.02^2).

With `mean_gradient=False` a_i = 1: the printed sum, whose steps grow with the
mini-batch. `gate` multiplies the output by gelu(W_g x), as the version for a
Mamba backbone does.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.cache import positions_of
from efficient_attn.layers.mixers.test_time.fast_mlp import (
  FAST_WEIGHTS,
  FastMLP,
)
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import Recurrent
from efficient_attn.ops.positions import rotary
from efficient_attn.values import ChunkSize, PositiveFloat

INIT_STD = 0.02


class TTTLinear(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = FAST_WEIGHTS
  counts = True

  hidden = ()  # widths between the layers of the model, in head widths

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    base_rate: PositiveFloat = 1.0,
    rotary_base: PositiveFloat = 10_000.0,
    mean_gradient: bool = True,
    gate: bool = False,
    chunk_size: ChunkSize = 16,
  ):
    head_dim = d_model // num_heads
    shape = (num_heads, head_dim)
    heads = {'heads': num_heads, 'head_dim': head_dim}
    self.qkv = QKV(d_model, query=shape, key=shape, value=shape, rngs=rngs)
    self.rate = Projection(
      {'embed': d_model},
      {'heads': num_heads},
      bias=True,
      init=lambda key, shape, _: INIT_STD * jax.random.normal(key, shape),
      rngs=rngs,
    )
    widths = (head_dim, *(x * head_dim for x in self.hidden), head_dim)
    self.model = FastMLP(num_heads, widths, norm=True, std=INIT_STD, rngs=rngs)
    self.shift = (
      param(jnp.zeros(chunk_size), (None,)) if mean_gradient else None
    )
    self.norm = JoinedLayerNorm(*shape)
    self.gate = (
      Projection({'embed': d_model}, heads, rngs=rngs) if gate else None
    )
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)
    self.base_rate = base_rate / head_dim
    self.rotary_base = rotary_base
    self.options = dict(bidirectional=not causal, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    positions = positions_of(context, past.cursor, x.shape[1])
    inner = positions % self.options['chunk_size']
    (q, k, v), _ = self.qkv(x)
    rate = jax.nn.sigmoid(self.rate(x).astype(jnp.float32))
    o, state = self.scan(
      context,
      past,
      q=rotary(q, inner, base=self.rotary_base),
      k=rotary(k, inner, base=self.rotary_base),
      v=v,
      learning_rate=self.base_rate * rate,
      shares=self._shares(),
      **self.model.arrays(),
    )
    y = self.norm(o)
    if self.gate is not None:
      y = y * jax.nn.gelu(self.gate(x))
    return self.out(y), state, None

  def _shares(self):
    """Returns a [chunk_size], or None where it is 1."""
    if self.shift is None:
      return None
    mean = 1 / jnp.arange(1, self.options['chunk_size'] + 1)
    return jax.nn.relu(mean + value_of(self.shift, jnp.float32))

  def init_state(self, batch, max_len, dtype):
    """Returns the initial weights."""
    return self.model.init_state(batch, dtype)


class TTTMLP(TTTLinear):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  hidden = (4,)

  def __init__(self, *, base_rate: PositiveFloat = 0.1, **options):
    super().__init__(base_rate=base_rate, **options)


class JoinedLayerNorm(nnx.Module):
  """Layer norm over all channels of all heads, [B, T, N, H] -> same."""

  def __init__(self, num_heads: int, head_dim: int, *, eps: float = 1e-6):
    axes = ('heads', 'head_dim')
    self.scale = param(jnp.ones((num_heads, head_dim)), axes)
    self.bias = param(jnp.zeros((num_heads, head_dim)), axes)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last two axes together."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x32 = x32 - jnp.mean(x32, axis=(-2, -1), keepdims=True)
    variance = jnp.mean(x32 * x32, axis=(-2, -1), keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + self.eps)
    y = y * value_of(self.scale, y.dtype) + value_of(self.bias, y.dtype)
    return y.astype(x.dtype)
