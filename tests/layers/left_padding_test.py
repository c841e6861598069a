"""Rows of unequal length in one batch: padding in front changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers import MIXERS, build_mixer, mixer_options
from efficient_attn.layers.recurrence import Recurrent
from tests.layers.built import filled

# Two pieces of a prompt, and what follows token by token.
PIECE, NEW, D = 4, 4, 16
# Padding ends within a piece, between two of them, and is not there.
LENGTHS = np.array([3, 2 * PIECE, 6, PIECE, 1])
TOTAL = 2 * PIECE + NEW
CLASSES = {n: s.build for n, s in MIXERS.items() if isinstance(s.build, type)}
RECURRENT = [n for n, c in CLASSES.items() if issubclass(c, Recurrent)]
SMALL = dict(chunk_size=2, window=3)


@jax.jit
def continued(mixer, x, ids):
  """Outputs of a prompt in two pieces, then of one token after another."""
  cache = mixer.init_cache(x.shape[0], TOTAL, x.dtype)
  done = []
  for piece in (slice(PIECE), slice(PIECE, 2 * PIECE)):

    def call(x, ids=ids[:, piece], cache=cache):
      return mixer(x, Context(segment_ids=ids), cache)

    # Differentiated, so that ops take their chunkwise form.
    y, _, cache = jax.vjp(call, x[:, piece], has_aux=True)
    done.append(y)

  def step(cache, token):
    y, cache = mixer(token[:, None], cache=cache)
    return cache, y[:, 0]

  _, y = jax.lax.scan(step, cache, jnp.moveaxis(x[:, 2 * PIECE :], 1, 0))
  return jnp.concatenate([*done, jnp.moveaxis(y, 0, 1)], axis=1)


def padded(x, fill):
  """Moves what a row has of its prompt to the end of the prompts."""
  shift = 2 * PIECE - LENGTHS[:, None]
  index = np.arange(TOTAL) - shift
  rows = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)
  return jnp.where((index < 0)[..., None], fill, rows), index


@pytest.mark.parametrize('name', RECURRENT)
def test_rows_of_unequal_length_equal_each_row_alone(name):
  options = {k: v for k, v in SMALL.items() if k in mixer_options(name)}
  rng = np.random.default_rng(3)
  x, noise = rng.standard_normal((2, len(LENGTHS), TOTAL, D))
  # In float64: some weights of rebased are small differences.
  with jax.enable_x64(True):
    mixer = filled(
      lambda: build_mixer(
        name, d_model=D, num_heads=2, rngs=nnx.Rngs(0), **options
      ),
      np.float64,
    )
    assert mixer.left_padding
    # All of it finite but one token.
    noise[0, 0] = np.nan
    rows, index = padded(x, 5 * noise)
    ids = jnp.asarray(index[:, : 2 * PIECE] >= 0, jnp.int32)
    # Of a causal mixer the first tokens are those of a shorter row.
    alone, _ = padded(jax.jit(lambda m, x: m(x)[0])(mixer, x), 0)
    y = jnp.where((index < 0)[..., None], 0, continued(mixer, rows, ids))
    np.testing.assert_allclose(y, alone, rtol=1e-6, atol=2e-6)
