"""Mamba-3 (Lahoti et al. 2603.15569), single input, single output.

  h_t = alpha_t h_{t-1} + (1 - l_t) dt_t alpha_t B~_{t-1} x_{t-1}^T
                        + l_t dt_t B~_t x_t^T
  y_t = h_t^T C~_t + D x_t,      out = W_out (y_t * silu(z_t))

alpha_t = exp(-dt_t softplus(a_t)) and l_t = sigmoid(.) come from x. B and C are
normalised, given a learned bias per head, and rotated in a quarter of their
channel pairs by the running sum of dt_t pi tanh(theta_t): a complex decay. No
convolution.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.decay import time_step_bias
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import LINEAR, Recurrence, Recurrent
from efficient_attn.ops.recurrent.trapezoid import trapezoidal_scan
from efficient_attn.values import ChunkSize, Positive, Share

MIN_RATE = 1e-4


class Mamba3(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = Recurrence(
    trapezoidal_scan,
    {
      **LINEAR.inputs,
      'log_decay': 'BTN',
      'dt': 'BTN',
      'right': 'BTN',
      'angles': 'BTNP',
    },
    state=('BNHV', 'BNH', 'BNV', 'BN', 'BNP'),
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    state_dim: Positive = 128,
    expand: Positive = 2,
    rotary_fraction: Share = 0.5,
    chunk_size: ChunkSize = 64,
  ):
    head_dim = expand * d_model // num_heads
    pairs = int(rotary_fraction * state_dim) // 2
    inputs, per_head = {'embed': d_model}, {'heads': num_heads}
    heads = {'heads': num_heads, 'head_dim': head_dim}
    self.gate, self.x = (Projection(inputs, heads, rngs=rngs) for _ in '12')
    self.b, self.c = (
      Projection(inputs, {'state': state_dim}, rngs=rngs) for _ in '12'
    )
    self.dt, self.rate, self.right = (
      Projection(inputs, per_head, rngs=rngs) for _ in '123'
    )
    self.angles = Projection(inputs, {'pairs': pairs}, rngs=rngs)
    bias = time_step_bias(rngs.params(), (num_heads,))
    self.dt_bias = param(bias, ('heads',), weight_decay=False)
    self.b_norm, self.c_norm = (RMSNorm(state_dim, eps=1e-5) for _ in '12')
    self.b_bias, self.c_bias = (
      param(jnp.ones((num_heads, state_dim)), ('heads', None)) for _ in '12'
    )
    self.skip = param(jnp.ones((num_heads, 1)), (*heads,), weight_decay=False)
    self.out = Projection(heads, inputs, rngs=rngs)
    self.sizes = dict(N=num_heads, H=state_dim, V=head_dim, P=pairs)
    self.options = dict(chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    k = self.b_norm(self.b(x))[:, :, None] + value_of(self.b_bias, x.dtype)
    q = self.c_norm(self.c(x))[:, :, None] + value_of(self.c_bias, x.dtype)
    v = self.x(x)
    dt, rate, right, angles = (
      p(x).astype(jnp.float32)
      for p in (self.dt, self.rate, self.right, self.angles)
    )
    dt = jax.nn.softplus(dt + value_of(self.dt_bias, jnp.float32))
    rate = jnp.maximum(jax.nn.softplus(rate), MIN_RATE)
    o, state = self.scan(
      context,
      past,
      q=q,
      k=k,
      v=v,
      log_decay=-rate * dt,
      dt=dt,
      right=jax.nn.sigmoid(right),
      angles=jnp.pi * jnp.tanh(angles)[:, :, None] * dt[..., None],
    )
    o = o + value_of(self.skip, o.dtype) * v
    return self.out(o * jax.nn.silu(self.gate(x))), state, None
