"""Low-rank adapters of a model's projections (LoRA, Hu et al. 2106.09685).

  y = x W + b + (alpha / rank) (x A) B

`adapt` adds them to a model, and `merge_adapters` returns the parameters of the
model without them, whose weights are W + (alpha / rank) A B.
"""

import fnmatch
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError, LoraConfig
from efficient_attn.layers.param import Projection, value_of
from efficient_attn.values import nearest

NAMES = ('lora_a', 'lora_b')  # in the paths of its parameters


class AdaptedProjection(Projection):
  """A projection with a low-rank update, which is zero at first.

  Args:
    base: of one layer or, with leading axes, of the layers of a scan.
    config: rank and alpha.
    rngs: of the parameters.
  """

  def __init__(self, base: Projection, config: LoraConfig, *, rngs: nnx.Rngs):
    self.weight, self.bias = base.weight, base.bias
    self.num_inputs = base.num_inputs
    self.scale = config.scale
    axes, inputs = self.weight.axes, self.num_inputs
    lead = self.weight.ndim - len(axes)
    stacked, shape = self.weight.shape[:lead], self.weight.shape[lead:]
    sizes = list(zip(axes, shape, strict=True))
    rank = {'rank': config.rank}

    def make(key):
      keys = nnx.Rngs(key)
      return (
        Projection(dict(sizes[:inputs]), rank, rngs=keys),
        Projection(rank, dict(sizes[inputs:]), init=_zeros, rngs=keys),
      )

    for _ in stacked:
      make = jax.vmap(make)
    keys = jax.random.split(rngs.params(), math.prod(stacked) or 1)
    self.lora_a, self.lora_b = make(keys.reshape(stacked))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., *inputs] to [..., *outputs]."""
    return super().__call__(x) + self.scale * self.lora_b(self.lora_a(x))

  def matrix(self, dtype) -> jax.Array:
    """Returns the updated weight in `dtype`, laid out for computation."""
    a, b = (value_of(p.weight, jnp.float32) for p in (self.lora_a, self.lora_b))
    update = self.scale * jnp.tensordot(a, b, 1, precision='highest')
    return (value_of(self.weight, jnp.float32) + update).astype(dtype)


def adapt(model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
  """Adds an adapter to each projection whose path `config.match` matches.

  Raises:
    ConfigError: a pattern matches none.
  """
  found = {
    '.'.join(map(str, path)): path
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Projection)
  }
  chosen = set()
  for pattern in config.match:
    matching = fnmatch.filter(found, pattern)
    if not matching:
      raise ConfigError(
        f'lora.match={pattern!r} matches no projection; '
        f'{nearest(pattern, found)}'
      )
    chosen |= set(matching)
  for name in sorted(chosen):
    *parents, last = found[name]
    parent = model
    for part in parents:
      parent = parent[part] if isinstance(part, int) else getattr(parent, part)
    if isinstance(last, int):
      parent[last] = AdaptedProjection(parent[last], config, rngs=rngs)
    else:
      adapted = AdaptedProjection(getattr(parent, last), config, rngs=rngs)
      setattr(parent, last, adapted)


def is_adapter(name: str) -> bool:
  """Whether a parameter of this path belongs to an adapter."""
  return not set(NAMES).isdisjoint(name.split('.'))


def merge_adapters(
  params: Mapping[str, jax.Array], config: LoraConfig
) -> dict[str, jax.Array]:
  """Returns the parameters, by path, of the model without its adapters."""
  found = {name: x for name, x in params.items() if not is_adapter(name)}
  for name in params:
    if not name.endswith('.lora_a.weight'):
      continue
    base = name.removesuffix('.lora_a.weight')
    weight = found[f'{base}.weight']
    factors = params[name], params[f'{base}.lora_b.weight']
    update = functools.partial(jnp.tensordot, axes=1)
    for _ in range(sum(x.ndim for x in factors) - 2 - weight.ndim):
      update = jax.vmap(update)  # the layers of a scan
    found[f'{base}.weight'] = weight + config.scale * update(*factors)
  return found


def _zeros(key, shape, fan_in):
  del key, fan_in
  return jnp.zeros(shape)
