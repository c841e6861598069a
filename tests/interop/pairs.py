"""A block of Hugging Face transformers and ours with the same weights."""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import DynamicCache

from efficient_attn.layers.mixers import build_mixer

D, N = 32, 4


@dataclasses.dataclass
class Pair:
  """Ours follows the contract of mixers; theirs maps (x, cache or None) to y.

  `theirs` updates its cache in place.
  """

  ours: Callable
  theirs: Callable
  new_cache: Callable[[], Any]


@contextlib.contextmanager
def hidden(*packages):
  """Runs imports as if `packages` were not installed."""
  modules = {name: sys.modules.pop(name, None) for name in packages}
  sys.modules.update(dict.fromkeys(packages))
  try:
    yield
  finally:
    for name, module in modules.items():
      del sys.modules[name]
      if module is not None:
        sys.modules[name] = module


def modeling(name: str):
  """Imports a model of transformers that runs PyTorch, not GPU packages."""
  with hidden('fla', 'xlstm'):
    path = f'transformers.models.{name}.modeling_{name}'
    return importlib.import_module(path)


def build(name: str, **options) -> nnx.Module:
  """A mixer without numbers, so that none can be forgotten."""

  def init():
    options.setdefault('num_heads', N)
    return build_mixer(name, d_model=D, rngs=nnx.Rngs(0), **options)

  return nnx.eval_shape(init)


def cached(ours, theirs, config) -> Pair:
  """A pair whose other half keeps its state in a cache of transformers."""
  theirs.eval()
  return Pair(
    ours,
    lambda x, cache=None: theirs(x, cache=cache),
    lambda: DynamicCache(config=config),
  )


def randomize(module: torch.nn.Module, **centers) -> dict[str, np.ndarray]:
  """Draws all parameters around 0 or what is said of a part of their name."""
  generator = torch.Generator().manual_seed(0)
  weights = {}
  for name, p in module.named_parameters():
    center = sum(c for part, c in centers.items() if name.startswith(part))
    p.data = center + 0.3 * torch.randn(p.shape, generator=generator)
    weights[name] = p.data.numpy()
  return weights


def put(p: nnx.Param, value: np.ndarray) -> None:
  """Sets a parameter of ours, whose axes are split into heads."""
  p.set_value(jnp.asarray(value.reshape(p.shape)))


def into(rows: np.ndarray) -> np.ndarray:
  """Puts the last axis, of inputs or of taps, first."""
  return np.moveaxis(rows, -1, 0)
