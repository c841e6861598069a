"""A small byte-level language model for the claims that need a trained one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn import config as configs
from efficient_attn import data
from efficient_attn.train.grid import Grid, Run

LENGTH = 256
CONFIG = dict(
  model=dict(name='lm', d_model=128, num_layers=4, num_heads=4),
  data=dict(name='text', seq_len=LENGTH),
  optimizer=dict(warmup_steps=30),
  steps=400,
  batch_size=16,
)


@functools.cache
def language_model() -> nnx.Module:
  """Softmax attention, trained for 400 steps of 16 x 256 bytes (a minute)."""
  config = configs.resolve(CONFIG)
  run = Run(learning_rate=3e-3, weight_decay=0.1, seed=0)
  grid = Grid(config, [run])
  while grid.steps < config.steps:
    grid.train(20)
  return grid.model(0)


@functools.cache
def texts(length: int, count: int) -> np.ndarray:
  """Validation bytes of the training's kind, [count, length]."""
  config = configs.resolve(configs.override(CONFIG, {'data.seq_len': length}))
  batches = iter(data.load(config.data, batch_size=count).valid)
  return next(batches)['tokens'][:, :length]


def losses(model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
  """Nats of every token but the first, [count, length - 1]."""
  graphdef, params = nnx.split(model)

  @jax.jit
  def run(params, tokens):
    logits, _ = nnx.merge(graphdef, params)(tokens[:, :-1])
    logits = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]

  return np.asarray(run(params, tokens))
