"""The data-dependent decay of Mamba-2 and its relatives.

log_decay_t = -exp(A_log) softplus(x_t W + dt_bias)

(Dao and Gu, 2405.21060). exp(A_log) starts uniform and softplus(dt_bias)
log-uniform in [1e-3, 1e-1]; both are exempt from weight decay.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.param import LowRank, Projection, param, value_of


def time_step_bias(
  key, shape, *, low: float = 1e-3, high: float = 1e-1
) -> jax.Array:
  """Biases whose softplus is log-uniform in [low, high]."""
  uniform = jax.random.uniform(key, shape)
  dt = jnp.exp(math.log(low) + uniform * math.log(high / low))
  return dt + jnp.log(-jnp.expm1(-dt))


class DecayGate(nnx.Module):
  """Maps x [B, T, D] to log decays <= 0, float32.

  [B, T, N] for `channels` = 0, one per key channel [B, T, N, H] otherwise.
  With `rank` > 0 the projection is low rank. exp(A_log) starts uniform in
  (lowest, 16]: 0 in the published delta rules, 1 in Mamba-2 and Kimi Linear.
  With `bound` < 0 log decays are bound sigmoid(exp(A_log) (x_t W + dt_bias)).
  """

  def __init__(
    self,
    d_model: int,
    num_heads: int,
    channels: int = 0,
    *,
    rank: int = 0,
    lowest: float = 0.0,
    bound: float = 0.0,
    rngs: nnx.Rngs,
  ):
    outputs = {'heads': num_heads}
    if channels:
      outputs['head_dim'] = channels
    if rank:
      self.project = LowRank(d_model, rank, outputs, rngs=rngs)
    else:
      self.project = Projection({'embed': d_model}, outputs, rngs=rngs)
    bias = time_step_bias(rngs.params(), tuple(outputs.values()))
    self.dt_bias = param(bias, (*outputs,), weight_decay=False)
    # Subtracted from 16: a rate of zero would have no logarithm.
    a = 16 - (16 - lowest) * jax.random.uniform(rngs.params(), (num_heads,))
    self.a_log = param(jnp.log(a), ('heads',), weight_decay=False)
    self.bound = bound

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the log decays of x [B, T, D]."""
    dt = self.project(x).astype(jnp.float32) + value_of(
      self.dt_bias, jnp.float32
    )
    rate = jnp.exp(value_of(self.a_log, jnp.float32))
    rate = rate.reshape(*rate.shape, *[1] * (dt.ndim - 3))
    if self.bound:
      return self.bound * jax.nn.sigmoid(rate * dt)
    return -rate * jax.nn.softplus(dt)
