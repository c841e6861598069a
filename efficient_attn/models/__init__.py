"""Models built from a `ModelConfig`, and how large they are."""

import dataclasses

import jax
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ModelConfig, choose
from efficient_attn.layers.stack import Stack
from efficient_attn.models.spec import KINDS
from efficient_attn.quick_compile import QUICK_COMPILE


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
  """Builds the model; an impossible config is a one-line `ConfigError`."""
  config = with_dtype(config)
  return choose('model.name', config.name, KINDS).build(config, rngs=rngs)


def init(config: ModelConfig, key: jax.Array) -> nnx.Module:
  """Builds the model in one compiled call, much faster than op by op."""
  compiled = jit_init(lambda key: build(config, rngs=nnx.Rngs(key)))
  return compiled(key)


def jit_init(f, mesh: jax.sharding.Mesh | None = None, **options):
  """Compiles a function that runs once and draws many random arrays.

  XLA takes about 0.2 s for each of them on CPU unless it is told not to bother.

  Args:
    f: the function.
    mesh: of its results; see `sharding.platform`.
    **options: of `jax.jit`.
  """
  if sharding.platform(mesh) == 'cpu':
    options['compiler_options'] = QUICK_COMPILE
  return jax.jit(f, **options)


def with_dtype(
  config: ModelConfig, mesh: jax.sharding.Mesh | None = None
) -> ModelConfig:
  """Fills in the dtype: float32 on CPU, where bfloat16 is twice as slow.

  Args:
    config: of the model.
    mesh: that the model is compiled for; see `sharding.platform`.
  """
  if config.dtype:
    return config
  dtype = 'float32' if sharding.platform(mesh) == 'cpu' else 'bfloat16'
  return dataclasses.replace(config, dtype=dtype)


def abstract(config: ModelConfig) -> nnx.Module:
  """Returns the model with shapes in place of arrays."""
  return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def penalty(model: nnx.Module) -> jax.Array | int:
  """Sums the auxiliary losses of all mixers, whatever stack they are in."""
  modules = (module for _, module in nnx.iter_modules(model))
  return sum(stack.penalty() for stack in modules if isinstance(stack, Stack))


def parameter_count(config: ModelConfig) -> int:
  """Returns the number of parameters."""
  leaves = jax.tree.leaves(nnx.state(abstract(config), nnx.Param))
  return sum(leaf.size for leaf in leaves)
