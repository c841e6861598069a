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
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  value_of,
)
from efficient_attn.layers.recurrence import LINEAR, Convolved, Recurrence
from efficient_attn.ops.recurrent.mlstm import mlstm
from efficient_attn.values import ChunkSize, Positive


class MLSTM(Convolved):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = Recurrence(
    mlstm,
    {**LINEAR.inputs, 'input_gate': 'BTN', 'log_forget': 'BTN'},
    state=('BNHV', 'BNH', 'BN'),
  )

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
    self.sizes = dict(N=num_heads, H=head_dim, V=head_dim)
    self.options = dict(chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    u = self.up(x)
    c, tail = self.convolve(u, context, past)
    q, k = _blocks(c, self.query), _blocks(c, self.key)
    v = _blocks(u, self.value)
    qkv = jnp.concatenate([q, k, v], axis=-1)
    input_gate, forget = (
      project(qkv).astype(jnp.float32) + value_of(bias, jnp.float32)
      for project, bias in (
        (self.input_gate, self.input_bias),
        (self.forget_gate, self.forget_bias),
      )
    )
    h, state = self.scan(
      context,
      past,
      q=q,
      k=k,
      v=v,
      input_gate=input_gate,
      log_forget=jax.nn.log_sigmoid(forget),
    )
    h = self.norm(h) + value_of(self.skip, x.dtype) * c
    return self.out(h * jax.nn.silu(self.gate(x))), state, tail


def _blocks(x, weight):
  """A linear map of every block of channels of every head."""
  heads, blocks, size, _ = weight.shape
  y = x.reshape(*x.shape[:2], heads, blocks, size)
  y = jnp.einsum('btnpi,npij->btnpj', y, value_of(weight, x.dtype))
  return y.reshape(x.shape)


def _zeros(key, shape, fan_in):
  return jnp.zeros(shape)
