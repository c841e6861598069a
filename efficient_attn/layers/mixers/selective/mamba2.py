"""Mamba-2 (Dao and Gu 2405.21060): a state space with one decay per head.

  S_t = exp(-exp(A) dt_t) S_{t-1} + B_t (dt_t x_t)^T     dt = softplus(. + b)
  y_t = S_t^T C_t + D x_t
  out = W_out rmsnorm(y_t * silu(z_t))

Linear attention with q = C, k = B, v = dt x. x, B and C pass through a short
causal convolution; one B and one C of 128 channels serve all heads, or the
heads of each of `groups` groups. The norm is over the heads of a group.
Falcon-H1 (2507.22448) normalises before the gate or not at all, and multiplies
z, x, B, C and dt by constants.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.layers.conv import ShortConv, convolve
from efficient_attn.layers.decay import time_step_bias
from efficient_attn.layers.head_norm import JointRMSNorm
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import LINEAR, Recurrent, with_key_heads
from efficient_attn.values import (
  ChunkSize,
  NonNegative,
  NonNegativeFloat,
  OneOf,
  Positive,
  PositiveFloat,
)


class Mamba2(Recurrent):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `head_dim` 0 is expand * D / num_heads. dt is clipped to [dt_min, dt_max].
  `multipliers` are those of z, x, B, C and dt, () for none.
  """

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
    head_dim: NonNegative = 0,
    groups: Positive = 1,
    conv_width: Positive = 4,
    conv_bias: bool = True,
    in_bias: bool = False,
    out_bias: bool = False,
    dt_min: NonNegativeFloat = 0.0,
    dt_max: PositiveFloat | None = None,
    multipliers: tuple[float, ...] = (),
    norm: Annotated[str, OneOf(('gated', 'before_gate', 'none'))] = 'gated',
    norm_eps: PositiveFloat = 1e-5,
    chunk_size: ChunkSize = 64,
  ):
    head_dim = head_dim or expand * d_model // num_heads
    if num_heads % groups:
      raise ConfigError(
        f'groups={groups} does not divide num_heads={num_heads}'
      )
    if len(multipliers) not in (0, 5):
      raise ConfigError(
        f'multipliers={multipliers} must be 5 numbers, for z, x, B, C and dt'
      )
    if dt_max is not None and dt_max < dt_min:
      raise ConfigError(f'dt_max={dt_max} is below dt_min={dt_min}')
    if groups > 1:
      self.recurrence = with_key_heads(self.recurrence, groups)
    inputs = {'embed': d_model}
    heads = {'heads': num_heads, 'head_dim': head_dim}
    state = {'state': 2 * groups * state_dim}  # B of all groups, C of all
    self.gate, self.x, self.bc, self.dt = (
      Projection(inputs, outputs, bias=in_bias, rngs=rngs)
      for outputs in (heads, heads, state, {'heads': num_heads})
    )
    self.x_conv, self.bc_conv = (
      ShortConv(channels, conv_width, bias=conv_bias, rngs=rngs)
      for channels in (heads, state)
    )
    bias = time_step_bias(rngs.params(), (num_heads,))
    self.dt_bias = param(bias, ('heads',), weight_decay=False)
    a = jax.random.uniform(rngs.params(), (num_heads,), minval=1, maxval=16)
    self.a_log = param(jnp.log(a), ('heads',), weight_decay=False)
    self.skip = param(jnp.ones((num_heads, 1)), (*heads,), weight_decay=False)
    if norm != 'none':
      self.norm = JointRMSNorm(num_heads, head_dim, eps=norm_eps, groups=groups)
    self.out = Projection(heads, inputs, bias=out_bias, rngs=rngs)
    self.norm_position = norm
    self.dt_range = (dt_min, dt_max) if dt_min or dt_max else None
    self.multipliers = multipliers
    self.groups = groups
    self.sizes = dict(N=num_heads, H=state_dim, V=head_dim)
    self.options = dict(scale=1, chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    gate, v, bc, dt = self.projected(x)
    (v, bc), tails = convolve(
      (self.x_conv, self.bc_conv), (v, bc), context, past.tails
    )
    o, state = self.scan(context, past, **self.arrays(x, dt, bc, v))
    o = o + value_of(self.skip, o.dtype) * v
    return self.out(self.gated(o, jax.nn.silu(gate))), state, tails

  def projected(self, x):
    """Returns the inputs of the gate, of x, of B and C, and of dt."""
    parts = [p(x) for p in (self.gate, self.x, self.bc, self.dt)]
    if not self.multipliers:
      return parts
    z, value, b, c, dt = self.multipliers
    half = self.bc.weight.shape[-1] // 2
    bc = jnp.repeat(jnp.asarray([b, c], x.dtype), half)
    return [a * m for a, m in zip(parts, (z, value, bc, dt), strict=True)]

  def gated(self, o, gate):
    """Multiplies o [B, T, N, V] by the gate, before or after the norm."""
    if self.norm_position == 'none':
      return o * gate
    if self.norm_position == 'before_gate':
      return self.norm(o) * gate
    return self.norm(o * gate)

  def arrays(self, x, dt, bc, v) -> dict[str, jax.Array]:
    """Returns the arguments of the op for x and what is made of it."""
    bc = bc.reshape(*bc.shape[:2], 2, self.groups, -1)
    k, q = bc[:, :, 0], bc[:, :, 1]
    dt = dt.astype(jnp.float32) + value_of(self.dt_bias, jnp.float32)
    dt = jax.nn.softplus(dt)
    if self.dt_range is not None:
      dt = jnp.clip(dt, *self.dt_range)
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
