"""Sizes of models and caches, counted on modules that hold no arrays."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import LMConfig
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers import build_mixer
from efficient_attn.layers.mixers.sparse.radial import Radial
from efficient_attn.models import cost

# A decoder of 7B parameters, as that of Llama.
SEVEN_B = LMConfig(
  d_model=4096,
  num_layers=32,
  num_heads=32,
  ffn_dim=11_008,
  vocab_size=32_000,
  tie_embeddings=False,
)
GPT3 = LMConfig(
  d_model=12_288,
  num_layers=96,
  num_heads=96,
  vocab_size=50_257,
  ffn='mlp',
  norm='layernorm',
  position='learned',
  mixers={'attention': dict(position='none')},
  dtype='bfloat16',
)
LLAMA = LMConfig(
  d_model=8192,
  num_layers=80,
  num_heads=64,
  ffn_dim=28_672,
  vocab_size=32_000,
  mixers={'attention': dict(num_kv_heads=8)},
  tie_embeddings=False,
)


@functools.cache
def _mixer(name: str, d_model: int, num_heads: int, options: tuple):
  return nnx.eval_shape(
    lambda: build_mixer(
      name,
      d_model=d_model,
      num_heads=num_heads,
      rngs=nnx.Rngs(0),
      **dict(options),
    )
  )


def mixer(name: str, d_model: int, num_heads: int, **options) -> nnx.Module:
  """Returns one layer's mixer with shapes in place of arrays."""
  return _mixer(name, d_model, num_heads, tuple(options.items()))


def parameters(module: nnx.Module) -> int:
  """Counts the parameters of a module."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(module)))


def _cache(module, tokens, dtype):
  graphdef, params = nnx.split(module)
  return jax.eval_shape(
    lambda params: nnx.merge(graphdef, params).init_cache(1, tokens, dtype),
    params,
  )


def cache_bytes(module, tokens: int, dtype=jnp.bfloat16) -> int:
  """Bytes of one sequence's decode state that has room for `tokens`."""
  return cost.array_bytes(_cache(module, tokens, dtype))


def forward_flops(module, x) -> float:
  """FLOPs of the products of module(x), x an array or its shape."""
  graphdef, params = nnx.split(module)
  return cost.flops(lambda p, x: nnx.merge(graphdef, p)(x), params, x)


def _grid(module: nnx.Module, length: int) -> tuple[int, ...]:
  """A line of tokens as a grid of one axis, or frames of 256 for a video."""
  frames = isinstance(getattr(module, 'mask_rule', None), Radial)
  return (length // 256, 256) if frames else (length,)


def training_pass(module, x, wrt=(0, 1), grid=()) -> cost.Counts:
  """Counts the gradient of sum(module(x)[0]) for parameters (0) and x (1).

  The tokens stand in a `grid`, by default in a line.
  """
  graphdef, params = nnx.split(module)

  def loss(params, x):
    context = Context(grid=grid or _grid(module, x.shape[1]))
    return jnp.sum(nnx.merge(graphdef, params)(x, context)[0])

  return cost.count(jax.grad(loss, wrt), params, x)


def decode_step(module, d_model: int, tokens: int) -> cost.Counts:
  """Counts one token whose cache has room for `tokens`."""
  x = jax.ShapeDtypeStruct((1, 1, d_model), jnp.float32)
  cache = _cache(module, tokens, jnp.float32)
  graphdef, params = nnx.split(module)

  def step(params, x, cache):
    return nnx.merge(graphdef, params)(x, cache=cache)[0]

  return cost.count(step, params, x, cache)
