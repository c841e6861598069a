"""The learned start of a model per head, and running it as fast weights."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.param import param, value_of
from efficient_attn.layers.recurrence import LINEAR, Recurrence
from efficient_attn.ops.recurrent.fast_weights import (
  FastState,
  fast_weights,
  fresh_state,
)
from efficient_attn.values import PositiveFloat


def state_layout(leaf: jax.Array) -> str:
  """The layout of weights [B, N, H, V], biases and what a head or row has."""
  return 'BNHV'[: leaf.ndim]


FAST_WEIGHTS = Recurrence(
  fast_weights,
  {
    **LINEAR.inputs,
    **dict.fromkeys(('learning_rate', 'log_decay', 'log_momentum'), 'BTN'),
    'shares': 'C',
    'weights': lambda leaf: 'NHV'[: leaf.ndim],
    'norm': 'NV',
  },
  state=state_layout,
)


class FastMLP(nnx.Module):
  """Weights [N, in, out], and biases and a layer norm where asked for.

  Weights are normal of standard deviation `std`, 1 / sqrt(in) by default.
  """

  def __init__(
    self,
    num_heads: int,
    widths: tuple[int, ...],
    *,
    norm: bool,
    std: PositiveFloat | None = None,
    rngs: nnx.Rngs,
  ):
    self.weights = nnx.List(
      param(
        jax.random.normal(rngs.params(), (num_heads, i, o))
        * (std or 1 / math.sqrt(i)),
        ('heads', None, None),
      )
      for i, o in itertools.pairwise(widths)
    )
    if norm:
      self.biases = nnx.List(
        param(jnp.zeros((num_heads, o)), ('heads', None)) for o in widths[1:]
      )
      self.scale = param(jnp.ones((num_heads, widths[-1])), ('heads', None))
      self.shift = param(jnp.zeros((num_heads, widths[-1])), ('heads', None))
    else:
      self.biases = None
    self.norm = norm

  def arrays(self) -> dict:
    """Returns the arguments of `ops.fast_weights` that are learned."""
    arrays = dict(weights=self.layers())
    if self.norm:
      norm = (
        value_of(self.scale, jnp.float32),
        value_of(self.shift, jnp.float32),
      )
      arrays['norm'] = norm
    return arrays

  def layers(self) -> tuple:
    """Returns (weight, bias or None) of every layer, float32."""
    biases = self.biases or [None] * len(self.weights)
    return tuple(
      (
        value_of(w, jnp.float32),
        None if b is None else value_of(b, jnp.float32),
      )
      for w, b in zip(self.weights, biases, strict=True)
    )

  def init_state(
    self, batch: int, dtype, *, momentum: bool = False
  ) -> FastState:
    """Returns the state before the first token, for inputs of `dtype`."""
    return own_state(
      fresh_state(self.layers(), batch, momentum=momentum), dtype
    )


def own_state(state, dtype):
  """Returns a state in the dtype that a step gives it, each buffer its own."""
  wide = jnp.promote_types(dtype, jnp.float32)

  def copied(x):
    return jnp.array(x, wide if jnp.issubdtype(x.dtype, jnp.floating) else None)

  return jax.tree.map(copied, state)
