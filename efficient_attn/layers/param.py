"""Parameters that know their logical axes, and the projection built on them."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError


def param(
  value: jax.Array,
  axes: tuple[str | None, ...],
  *,
  inputs: int = 0,
  weight_decay: bool | None = None,
) -> nnx.Param:
  """Returns an `nnx.Param` with the metadata the trainer reads.

  Args:
    value: float32 array.
    axes: logical axis of each dimension (see `sharding.RULES`).
    inputs: how many leading dimensions a matrix contracts; 0: not a matrix.
    weight_decay: whether the optimizer decays it; None: if it is a matrix.
  """
  if value.ndim != len(axes):
    raise ValueError(f'{value.ndim} dimensions but axes={axes}')
  decay = inputs > 0 if weight_decay is None else weight_decay
  return nnx.Param(value, axes=axes, inputs=inputs, weight_decay=decay)


def matrices_apart(p: nnx.Param) -> int:
  """Returns how many leading axes number matrices: of layers and experts."""
  return p.ndim - len(p.axes) + p.axes.count('experts')


def value_of(p: nnx.Param, dtype) -> jax.Array:
  """Returns the value of a parameter in `dtype`, laid out for computation."""
  return sharding.constrain(p[...].astype(dtype), *p.axes)


def clip_to_unit(x: jax.Array) -> jax.Array:
  """Clips to [0, 1] with a gradient of 1, so that what left may come back."""
  return x + jax.lax.stop_gradient(jnp.clip(x, 0, 1) - x)


def fan_in_normal(scale: float = 1.0) -> Callable:
  """Truncated normal of standard deviation scale / sqrt(fan_in)."""

  def init(key, shape, fan_in):
    std = scale / math.sqrt(fan_in)
    # The variance of a unit normal cut at 2 is 0.8796^2.
    unit = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return unit * (std / 0.87962566)

  return init


class Projection(nnx.Module):
  """A linear map between named axes: `{'embed': D} -> {'heads': N, 'dim': H}`.

  The names are logical axes, so the projection also knows its sharding. The
  weight has the shape of the inputs followed by the outputs, is kept in float32
  and used in the dtype of the activations.
  """

  def __init__(
    self,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    *,
    rngs: nnx.Rngs,
    bias: bool = False,
    init: Callable | None = None,
  ):
    sizes = {**inputs, **outputs}
    for axis, size in sizes.items():
      if size < 1:
        raise ConfigError(
          f'the {axis} axis of a projection {sizes} has size {size}; raise '
          'model.d_model or the option that divides it'
        )
    shape = (*inputs.values(), *outputs.values())
    init = init or fan_in_normal()
    weight = init(rngs.params(), shape, math.prod(inputs.values()))
    self.weight = param(weight, (*inputs, *outputs), inputs=len(inputs))
    zeros = jnp.zeros(tuple(outputs.values()))
    self.bias = param(zeros, (*outputs,)) if bias else None
    self.num_inputs = len(inputs)

  def matrix(self, dtype) -> jax.Array:
    """Returns the weight in `dtype`, laid out for computation."""
    return value_of(self.weight, dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., *inputs] to [..., *outputs]."""
    names = self.weight.axes
    lead = x.ndim - self.num_inputs
    out = activation_axes(lead) + names[self.num_inputs :]
    contract = (tuple(range(lead, x.ndim)), tuple(range(self.num_inputs)))
    y = jax.lax.dot_general(
      x,
      value_of(self.weight, x.dtype),
      (contract, ((), ())),
      out_sharding=sharding.current(sharding.activation_spec(out)),
    )
    if self.bias is not None:
      y = y + value_of(self.bias, x.dtype)
    return y


class LowRank(nnx.Module):
  """A projection through `rank` channels: x [B, T, D] -> [B, T, *outputs]."""

  def __init__(
    self,
    d_model: int,
    rank: int,
    outputs: Mapping[str, int],
    *,
    rngs: nnx.Rngs,
    activation: Callable | None = None,
    bias: bool = False,
    inits: tuple[Callable | None, Callable | None] = (None, None),
  ):
    ranks = {'rank': rank}
    self.down = Projection({'embed': d_model}, ranks, init=inits[0], rngs=rngs)
    self.up = Projection(ranks, outputs, init=inits[1], rngs=rngs, bias=bias)
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, D] to [B, T, *outputs]; `activation` acts on the rank."""
    x = self.down(x)
    return self.up(x if self.activation is None else self.activation(x))


def activation_axes(lead: int) -> tuple[str | None, ...]:
  """Returns the logical axes of `lead` leading activation dimensions."""
  return ('batch',) + (None,) * (lead - 1)
