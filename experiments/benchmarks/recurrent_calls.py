"""Calls of the ops whose state is not one matrix, for their accuracy.

Each entry maps a function that draws numbers to the arguments of the op; the
recurrent form in float64 is what the other forms are held to.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn import ops

# Ops whose form in chunks goes by another name.
FORM = {'path_attention': 'blockwise'}


class Draw:
  """Random arrays [1, T, N, ...] from one seed, each call another one."""

  def __init__(self, length: int, heads: int, width: int, seed: int):
    self.keys = iter(jax.random.split(jax.random.key(seed), 20))
    self.tokens = (1, length, heads)
    self.heads, self.width = (heads,), width

  def normal(self, *shape):
    """Standard normal of the shape."""
    return jax.random.normal(next(self.keys), shape)

  def unit(self):
    """Vectors of length 1, [1, T, N, H]."""
    x = self.normal(*self.tokens, self.width)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  def value(self):
    """Standard normal [1, T, N, H]."""
    return self.normal(*self.tokens, self.width)

  def rate(self, *channels):
    """Between 0 and 1, [1, T, N, *channels]."""
    return jax.random.uniform(next(self.keys), (*self.tokens, *channels))

  def decay(self, *shape):
    """Log decays, log-uniform in [-10, -1e-4]; per token without a shape."""
    exponent = jax.random.uniform(
      next(self.keys), shape or self.tokens, minval=-4, maxval=1
    )
    return -(10.0**exponent)


CALLS = {
  'diagonal_scan': lambda d: dict(
    x=d.value(), log_decay=d.decay(*d.tokens, d.width)
  ),
  'selective_scan': lambda d: dict(
    x=d.value(),
    dt=jax.nn.softplus(d.value() - 2),
    A=-jnp.exp(d.normal(*d.heads, d.width, 16)),
    B=d.normal(*d.tokens[:2], 16),
    C=d.normal(*d.tokens[:2], 16),
  ),
  'wkv4': lambda d: dict(
    k=3 * d.value(),
    v=d.value(),
    log_decay=d.decay(*d.heads, d.width),
    bonus=d.normal(*d.heads, d.width),
  ),
  'mlstm': lambda d: dict(
    q=d.unit(),
    k=d.unit(),
    v=d.value(),
    input_gate=3 * d.normal(*d.tokens),
    log_forget=d.decay(),
  ),
  'gated_slot_attention': lambda d: dict(
    q=d.value(),
    k=d.value(),
    v=d.value(),
    log_decay=d.decay(*d.tokens, d.width),
  ),
  'trapezoidal_scan': lambda d: dict(
    q=d.unit(),
    k=d.unit(),
    v=d.value(),
    log_decay=d.decay(),
    dt=d.rate(),
    right=d.rate(),
    angles=d.rate(d.width // 2),
  ),
  'log_linear_attention': lambda d: dict(
    q=d.unit(),
    k=d.unit(),
    v=d.value(),
    log_decay=d.decay(),
    level_scales=d.rate(12),
  ),
  'mesa': lambda d: dict(
    q=d.unit(),
    k=d.unit(),
    v=d.value(),
    log_decay=d.decay(),
    beta=d.rate(),
    ridge=0.25 + jnp.ones((*d.heads, d.width)),
  ),
  'path_attention': lambda d: dict(
    q=d.value(),
    k=d.value(),
    v=d.value(),
    w=d.unit(),
    beta=2 * d.rate(),
    log_forget=d.decay(),
  ),
  'fast_weights': lambda d: dict(
    q=d.unit(),
    k=d.unit(),
    v=d.value(),
    learning_rate=d.rate(),
    log_decay=d.decay(),
    log_momentum=d.decay() - 0.1,
    weights=((d.normal(*d.heads, d.width, d.width) / d.width, None),),
  ),
}


def arrays(name: str, length: int, heads: int, width: int, seed: int):
  """Returns the float32 arguments of the op `name`."""
  return CALLS[name](Draw(length, heads, width, seed))


def forward(name: str, form: str):
  """Returns the op as a function of its arrays by name."""
  op = functools.partial(getattr(ops, name), form=form)
  return lambda arrays: op(**arrays)[0]
