"""Mamba-2 (Dao and Gu 2405.21060): a state space with one decay per head.

  S_t = exp(-exp(A) dt_t) S_{t-1} + B_t (dt_t x_t)^T     dt = softplus(. + b)
  y_t = S_t^T C_t + D x_t
  out = W_out rmsnorm(y_t * silu(z_t))

Linear attention with q = C, k = B, v = dt x. x, B and C pass through a short
causal convolution; one B and one C of 128 channels serve all heads; the norm is
over all heads.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.conv import ShortConv, convolve
from efficient_attn.layers.decay import time_step_bias
from efficient_attn.layers.head_norm import JointRMSNorm
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import LINEAR, Recurrent
from efficient_attn.values import ChunkSize, Positive, PositiveFloat


class Mamba2(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  # The one head of q and k is on every device.
  recurrence = LINEAR.taking(q='BTGH', k='BTGH', log_decay='BTN')

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    state_dim: Positive = 128,
    expand: Positive = 2,
    conv_width: Positive = 4,
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    head_dim = expand * d_model // num_heads
    inputs = {'embed': d_model}
    heads = {'heads': num_heads, 'head_dim': head_dim}
    state = {'state': 2 * state_dim}  # B and C
    self.gate = Projection(inputs, heads, rngs=rngs)
    self.x = Projection(inputs, heads, rngs=rngs)
    self.bc = Projection(inputs, state, rngs=rngs)
    self.dt = Projection(inputs, {'heads': num_heads}, rngs=rngs)
    self.x_conv = ShortConv(heads, conv_width, bias=True, rngs=rngs)
    self.bc_conv = ShortConv(state, conv_width, bias=True, rngs=rngs)
    bias = time_step_bias(rngs.params(), (num_heads,))
    self.dt_bias = param(bias, ('heads',), weight_decay=False)
    a = jax.random.uniform(rngs.params(), (num_heads,), minval=1, maxval=16)
    self.a_log = param(jnp.log(a), ('heads',), weight_decay=False)
    self.skip = param(jnp.ones((num_heads, 1)), (*heads,), weight_decay=False)
    self.norm = JointRMSNorm(num_heads, head_dim, eps=norm_eps)
    self.out = Projection(heads, inputs, rngs=rngs)
    self.sizes = dict(N=num_heads, H=state_dim, V=head_dim)
    self.options = dict(scale=1, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    (v, bc), tails = convolve(
      (self.x_conv, self.bc_conv),
      (self.x(x), self.bc(x)),
      context,
      past.tails,
    )
    o, state = self.scan(context, past, **self.arrays(x, bc, v))
    o = o + value_of(self.skip, o.dtype) * v
    y = self.out(self.norm(o * jax.nn.silu(self.gate(x))))
    return y, state, tails

  def arrays(self, x, bc, v) -> dict[str, jax.Array]:
    """Returns the arguments of the op for x and what the convolutions make."""
    k, q = jnp.split(bc[:, :, None], 2, axis=-1)
    dt = self.dt(x).astype(jnp.float32) + value_of(self.dt_bias, jnp.float32)
    dt = jax.nn.softplus(dt)
    return dict(
      q=q,
      k=k,
      v=(dt[..., None] * v).astype(v.dtype),
      log_decay=-jnp.exp(value_of(self.a_log, jnp.float32)) * dt,
    )

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    convs = self.x_conv, self.bc_conv
    return tuple(conv.init_state(batch, dtype) for conv in convs)
