"""A small byte-level language model for the claims that need a trained one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn import config as configs
from efficient_attn import data
from efficient_attn.layers.capture import captured
from efficient_attn.train.grid import Grid, Run
from efficient_attn.train.objectives.cross_entropy import cross_entropy
from efficient_attn.train.state import Architecture

CONFIG = dict(
  model=dict(
    name='lm',
    d_model=64,
    num_layers=4,
    num_heads=2,
    pattern=('attention',) * 4,  # one period: no scan hides the layers
  ),
  data=dict(name='text', seq_len=256),
  optimizer=dict(warmup_steps=30),
  steps=400,
  batch_size=16,
)


@functools.cache
def language_model() -> nnx.Module:
  """Softmax attention after 400 steps of 16 x 256 bytes: about a minute."""
  config = configs.resolve(CONFIG)
  run = Run(learning_rate=1e-2, weight_decay=0.1, seed=0)
  grid = Grid(config, [run])
  while grid.steps < config.steps:
    grid.train(20)
  return grid.model(0)


@functools.cache
def untrained() -> nnx.Module:
  """The same model as it began."""
  architecture = Architecture(configs.resolve(CONFIG).model)
  return architecture.merge(architecture.initial_params(jax.random.key(0)))


def with_mixer(model: nnx.Module, name: str, **options) -> nnx.Module:
  """The model with another mixer of the same parameters."""
  changes = {
    'model.pattern': (name,) * CONFIG['model']['num_layers'],
    'model.mixers': {name: options},
  }
  config = configs.resolve(configs.override(CONFIG, changes))
  return Architecture(config.model).merge(nnx.state(model))


@functools.cache
def texts(length: int, count: int) -> np.ndarray:
  """Validation bytes of the training's kind, [count, length]."""
  config = configs.resolve(configs.override(CONFIG, {'data.seq_len': length}))
  batches = iter(data.load(config.data, batch_size=count).valid)
  return next(batches)['tokens'][:, :length]


@jax.jit
def losses(model: nnx.Module, tokens: np.ndarray) -> jax.Array:
  """Nats of every token but the first, [count, length - 1]."""
  logits, _ = model(tokens[:, :-1])
  return cross_entropy(logits, tokens[:, 1:])[1]


@jax.jit
def cached_losses(model: nnx.Module, tokens: np.ndarray) -> jax.Array:
  """The same, token by token through the cache."""

  def step(cache, pair):
    now, wanted = pair
    logits, cache = model(now[:, None], cache=cache)
    return cache, cross_entropy(logits[:, 0], wanted)[1]

  pairs = tokens[:, :-1].T, tokens[:, 1:].T
  return jax.lax.scan(step, model.init_cache(*tokens.shape), pairs)[1].T


def activations(model: nnx.Module, tokens: np.ndarray) -> list[dict]:
  """Every layer's query, key and value [B, T, N, H], and the unrotated key."""
  names = ('query', 'key', 'value', 'raw_key')
  x = model.embed(jnp.asarray(tokens), jnp.float32)
  _, found = captured(model.stack, *names)(x)
  layers = zip(*(found[name] for name in names), strict=True)
  return [dict(zip(names, layer, strict=True)) for layer in layers]
