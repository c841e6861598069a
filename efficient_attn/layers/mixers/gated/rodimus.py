"""Rodimus (He et al. 2410.06577): tempered selection.

  S_t = diag(exp(-g_t tau_t)) S_{t-1} + (g_t^tau_t k_t) (b_t * u_t)^T
  o_t = S_t^T q_t / sqrt(H) + d * c_t
  g_t = softplus(W_g c_t + b_g)       tau_t = sigmoid(W_tau c_t + b_tau)
  b_t = sigmoid(W_2 W_1 u_t + b_b)    u_t = W_u x_t,  c_t = silu(conv(u_t))

with q_t and the unit-length k_t from c_t. u is twice as wide as x; the output
is W_out norm(o_t * silu(W_z x_t)). One query, key and gate of 64 channels
serve all values: the heads only say how values are divided among devices.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import ShortConv
from efficient_attn.layers.head_norm import JointRMSNorm
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import Convolved, Recurrence
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.values import ChunkSize, Positive, PositiveFloat


def _one_key(q, k, v, log_decay, *, initial_state, **options):
  """Linear attention of one head of q, k [B, T, H] and v [B, T, N, V]."""
  batch, length, heads, width = v.shape
  if initial_state is not None:  # [B, N, H, V] to one head of N V values
    initial_state = jnp.moveaxis(initial_state, 1, 2)
    initial_state = initial_state.reshape(batch, 1, -1, heads * width)
  o, state = linear_attention(
    q[:, :, None],
    k[:, :, None],
    v.reshape(batch, length, 1, -1),
    log_decay=log_decay[:, :, None],
    initial_state=initial_state,
    **options,
  )
  state = state.reshape(batch, -1, heads, width)
  return o.reshape(v.shape), jnp.moveaxis(state, 2, 1)


class Rodimus(Convolved):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = Recurrence(
    _one_key,
    dict(q='BTH', k='BTH', v='BTNV', log_decay='BTH'),
    state='BNHV',
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    state_dim: Positive = 64,
    expand: Positive = 2,
    conv_width: Positive = 4,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    value_dim = expand * d_model // num_heads
    inputs = {'embed': d_model}
    values = {'heads': num_heads, 'head_dim': value_dim}
    keys = {'state': state_dim}
    rank = {'rank': max(d_model // 64, 16)}
    self.up = Projection(inputs, values, rngs=rngs)
    self.gate = Projection(inputs, values, rngs=rngs)
    self.conv = ShortConv(values, conv_width, bias=True, rngs=rngs)
    self.query = Projection(values, keys, rngs=rngs)
    self.key = Projection(values, keys, rngs=rngs)
    self.select = Projection(values, keys, bias=True, rngs=rngs)
    self.temper = Projection(values, keys, bias=True, rngs=rngs)
    self.write_down = Projection(values, rank, rngs=rngs)
    self.write_up = Projection(rank, values, bias=True, rngs=rngs)
    self.skip = param(jnp.ones((num_heads, value_dim)), (*values,))
    self.norm = JointRMSNorm(num_heads, value_dim, eps=norm_eps)
    self.out = Projection(values, inputs, rngs=rngs)
    self.sizes = dict(N=num_heads, H=state_dim, V=value_dim)
    self.options = dict(chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    u = self.up(x)
    c, tail = self.convolve(u, context, past)
    select = self.select(c).astype(jnp.float32)
    temper = jax.nn.sigmoid(self.temper(c).astype(jnp.float32))
    k = self.key(c).astype(jnp.float32)
    k = k * jax.lax.rsqrt(jnp.sum(k * k, -1, keepdims=True) + 1e-12)
    o, state = self.scan(
      context,
      past,
      q=self.query(c),
      k=(k * jnp.exp(temper * _log_softplus(select))).astype(x.dtype),
      v=u * jax.nn.sigmoid(self.write_up(self.write_down(u))),
      log_decay=-jax.nn.softplus(select) * temper,
    )
    o = o + value_of(self.skip, o.dtype) * c
    y = self.out(self.norm(o * jax.nn.silu(self.gate(x))))
    return y, state, tail


def _log_softplus(x):
  """log(log(1 + exp(x))), also where softplus underflows."""
  low = x < -20
  return jnp.where(low, x, jnp.log(jax.nn.softplus(jnp.where(low, 0, x))))
