"""Calls of the ops with a matrix state, for accuracy and for time."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_attn import ops


@dataclasses.dataclass(frozen=True)
class Call:
  """An op with a kind of gate.

  Attributes:
    op: the op.
    gate: none | scalar | channel.
    inputs: the names of its arguments after q, k and v.
  """

  op: Callable
  gate: str
  inputs: tuple[str, ...] = ()

  def arrays(self, length: int, *, heads: int = 8, width: int = 64, seed=0):
    """Returns float32 arguments by name, B = 1 and H = V = width.

    Keys have unit length and beta reaches 1, as in trained models; decays are
    log-uniform, from forgetting at once to not at all.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    shape = (1, length, heads, width)

    def normal():
      return jax.random.normal(next(keys), shape)

    def unit():
      x = normal()
      return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    found = {'q': unit(), 'k': unit(), 'v': normal()}
    if 'beta' in self.inputs:
      found['beta'] = jax.random.uniform(next(keys), shape[:3])
    if 'a' in self.inputs:
      direction = unit()
      found['a'] = -direction
      found['b'] = direction * jax.random.uniform(next(keys), shape)
    if self.gate != 'none':
      shape = shape if self.gate == 'channel' else shape[:3]
      exponent = jax.random.uniform(next(keys), shape, minval=-4, maxval=1)
      found['log_decay'] = -(10.0**exponent)
    return found

  def normal_form(self, arrays):
    """Returns q, k, v, a, b, alpha of S = diag(alpha) S + b a^T S + k v^T."""
    q, k, v = (arrays[name] for name in 'qkv')
    alpha = jnp.ones_like(k)
    if 'log_decay' in arrays:
      gate = jnp.exp(arrays['log_decay'])
      alpha = gate * alpha if gate.ndim == 4 else gate[..., None] * alpha
    if 'beta' in arrays:
      beta = arrays['beta'][..., None].astype(k.dtype)
      return q, k, beta * v, alpha * k, -beta * k, alpha
    zeros = jnp.zeros_like(k)
    return q, k, v, arrays.get('a', zeros), arrays.get('b', zeros), alpha


CALLS = {
  'linear_none': Call(ops.linear_attention, 'none'),
  'linear_scalar': Call(ops.linear_attention, 'scalar'),
  'linear_channel': Call(ops.linear_attention, 'channel'),
  'delta_none': Call(ops.delta_rule, 'none', ('beta',)),
  'delta_scalar': Call(ops.delta_rule, 'scalar', ('beta',)),
  'delta_channel': Call(ops.delta_rule, 'channel', ('beta',)),
  'dplr_channel': Call(ops.dplr, 'channel', ('a', 'b')),
}


def forward(call: Call, form: str | None, chunk_size: int = 64) -> Callable:
  """Returns the op as a function of its arrays by name."""

  def run(arrays):
    return call.op(**arrays, form=form, chunk_size=chunk_size)[0]

  return run


def gradients(run: Callable) -> Callable:
  """Returns the gradients of a weighted sum of the outputs."""

  def loss(arrays):
    out = run(arrays).astype(jnp.float32)
    weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
    return jnp.vdot(weight.reshape(out.shape), out)

  return jax.grad(loss)


def plain(call: Call, dtype: str) -> Callable:
  """Returns the recurrence in its normal form, everything in `dtype`."""
  dtype = jnp.dtype(dtype)
  precision = jax.lax.Precision.HIGHEST
  einsum = functools.partial(jnp.einsum, precision=precision)

  def step(state, token):
    q, k, v, a, b, alpha = token
    recalled = einsum('bnh,bnhv->bnv', a, state)
    state = alpha[..., None] * state + b[..., None] * recalled[..., None, :]
    state = state + k[..., None] * v[..., None, :]
    return state, einsum('bnh,bnhv->bnv', q, state)

  def run(arrays):
    tokens = call.normal_form(arrays)
    tokens = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in tokens]
    _, batch, heads, width = tokens[0].shape
    state = jnp.zeros((batch, heads, width, width), dtype)
    _, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1) * jnp.asarray(width**-0.5, dtype)

  return run
