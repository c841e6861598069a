"""mLSTM, the block of xLSTM with a matrix memory (Beck et al. 2405.04517).

  C_t = f_t C_{t-1} + exp(i_t) k_t v_t^T,    n_t = f_t n_{t-1} + exp(i_t) k_t
  h_t = C_t^T q_t / max(|n_t . q_t|, 1),     f_t = sigmoid(.)

x is projected up to twice its width, u and z. q and k come from c =
silu(conv(u)), v from u, each by blocks of 4 channels; the gates from q, k and
v. The output is W_out ((groupnorm(h_t) + s * c_t) * silu(z_t)).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.head_norm import HeadLayerNorm
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  use,
)
from efficient_attn.layers.recurrence import run_op
from efficient_attn.ops.recurrent.mlstm import mlstm
from efficient_attn.values import ChunkSize, Positive


class MLSTM(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    expand: Positive = 2,
    block: Positive = 4,
    conv_width: Positive = 4,
    chunk_size: ChunkSize = 64,
  ):
    head_dim = expand * d_model // num_heads
    if head_dim % block:
      raise ConfigError(
        f'mlstm: block={block} does not divide the {head_dim} channels of a '
        'head; pass another block or num_heads'
      )
    inputs = {'embed': d_model}
    heads = {'heads': num_heads, 'head_dim': head_dim}
    self.up = Projection(inputs, heads, rngs=rngs)
    self.gate = Projection(inputs, heads, rngs=rngs)
    self.conv = ShortConv(heads, conv_width, bias=True, rngs=rngs)
    shape = (num_heads, head_dim // block, block, block)
    self.query, self.key, self.value = (
      param(
        fan_in_normal()(rngs.params(), shape, block),
        ('heads', None, None, None),
        weight_decay=True,
      )
      for _ in range(3)
    )
    # The gates of a head see all heads.
    qkv = {'heads': num_heads, 'head_dim': 3 * head_dim}
    self.input_gate, self.forget_gate = (
      Projection(qkv, {'gates': num_heads}, init=_zeros, rngs=rngs)
      for _ in range(2)
    )
    bias = 0.1 * jax.random.normal(rngs.params(), (num_heads,))
    self.input_bias = param(bias, (None,), weight_decay=False)
    bias = jnp.linspace(3.0, 6.0, num_heads)
    self.forget_bias = param(bias, (None,), weight_decay=False)
    self.norm = HeadLayerNorm(num_heads, head_dim, bias=False)
    self.skip = param(jnp.ones((num_heads, head_dim)), (*heads,))
    self.out = Projection(heads, inputs, rngs=rngs)
    self.state_shape = (num_heads, head_dim, head_dim)
    self.chunk_size = chunk_size

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    u = self.up(x)
    c, tail = self.conv(
      u, segment_ids=context.segment_ids, state=cache and cache['conv']
    )
    q, k = _blocks(c, self.query), _blocks(c, self.key)
    v = _blocks(u, self.value)
    qkv = jnp.concatenate([q, k, v], axis=-1)
    input_gate, forget = (
      project(qkv).astype(jnp.float32) + use(bias, jnp.float32)
      for project, bias in (
        (self.input_gate, self.input_bias),
        (self.forget_gate, self.forget_bias),
      )
    )
    h, state = run_op(
      mlstm,
      dict(
        q=q,
        k=k,
        v=v,
        input_gate=input_gate,
        log_forget=jax.nn.log_sigmoid(forget),
      ),
      segment_ids=context.segment_ids,
      state=cache and cache['state'],
      chunk_size=self.chunk_size,
    )
    h = self.norm(h) + use(self.skip, x.dtype) * c
    if cache is not None:
      cache = dict(state=state, conv=tail)
    return self.out(h * jax.nn.silu(self.gate(x))), cache

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state; `max_len` does not matter."""
    shape = (batch, *self.state_shape)
    state = tuple(jnp.zeros(shape[:rank]) for rank in (4, 3, 2))
    return dict(state=state, conv=self.conv.init_state(batch, dtype))


def _blocks(x, weight):
  """A linear map of every block of channels of every head."""
  heads, blocks, size, _ = weight.shape
  y = x.reshape(*x.shape[:2], heads, blocks, size)
  y = jnp.einsum('btnpi,npij->btnpj', y, use(weight, x.dtype))
  return y.reshape(x.shape)


def _zeros(key, shape, fan_in):
  return jnp.zeros(shape)
