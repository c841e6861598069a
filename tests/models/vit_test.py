"""The vision transformer with every mixer that can be bidirectional."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models
from efficient_attn.config import ConfigError, ViTConfig
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers import MIXERS
from efficient_attn.models.vit import patches
from tests.layers.built import filled

IMAGE = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))


def build(**changes):
  config = ViTConfig(**dict(d_model=16, num_heads=2, num_layers=2) | changes)
  return filled(lambda: models.build(config, rngs=nnx.Rngs(0)))


call = jax.jit(lambda model, image: model(image))


# Both kinds of encoder, and softmax; that every row can be an encoder's mixer
# is tested with the mixers.
ENCODERS = ('window', 'linear', 'mamba')
OPTIONS = {
  'neighborhood': dict(window=3),
  'sinkhorn': dict(block_size=4),  # divides 16 patches
  'sliding_tile': dict(tile=2),
  'vsa': dict(cube=(2, 2)),
}


@pytest.mark.parametrize(
  'mixer, pooling',
  [
    ('attention', 'cls'),
    *((name, 'mean') for name in ENCODERS),
    *(
      pytest.param(name, 'mean', marks=pytest.mark.exhaustive)
      for name, spec in MIXERS.items()
      if spec.bidirectional and name not in ENCODERS
    ),
  ],
)
def test_every_patch_reaches_the_logits(mixer, pooling):
  options = {mixer: OPTIONS.get(mixer, {})}
  model = build(pattern=(mixer,), pooling=pooling, mixers=options)
  logits = call(model, IMAGE)
  assert logits.shape == (3, 10) and logits.dtype == jnp.float32
  gradient = jax.jit(jax.grad(lambda image: model(image)[:, 0].sum()))(IMAGE)
  np.testing.assert_array_less(0, np.abs(patches(gradient, 2)).max(axis=-1))


@pytest.mark.parametrize('position', ['learned', 'sincos'])
def test_positions_matter(position):
  model = build(position=position, pattern=('linear',))
  # Swapping two patches changes nothing without positions.
  swapped = jnp.concatenate([IMAGE[:, 2:4], IMAGE[:, :2], IMAGE[:, 4:]], axis=1)
  assert np.abs(call(model, swapped) - call(model, IMAGE)).max() > 1e-3


def test_patches_are_row_major():
  image = jnp.arange(16.0).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(
    patches(image, 2)[0],
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
  )


def test_mistakes():
  with pytest.raises(ConfigError, match='not divisible by model.patch_size=3'):
    build(patch_size=3)
  with pytest.raises(ValueError, match='set model.image_size'):
    build()(jnp.zeros((1, 4, 4, 1)))


GRIDS = ('neighborhood', 'sliding_tile', 'radial', 'vsa')


@pytest.mark.parametrize('mixer', GRIDS)
def test_a_class_token_has_no_place_in_a_grid(mixer):
  with pytest.raises(ConfigError, match="needs a grid .* model.pooling='mean'"):
    build(pattern=('attention', mixer), pooling='cls')


def test_a_grid_of_two_axes():
  options = {'sliding_tile': dict(tile=3)}
  with pytest.raises(ConfigError, match=r'mixers\.sliding_tile: tile=\(3, 3\)'):
    build(pattern=('sliding_tile',), pooling='mean', mixers=options)


def test_neighbours_are_those_of_the_image():
  """A place sees those above and below it, not only those of its row."""
  options = {'neighborhood': dict(window=3)}
  model = build(
    pattern=('neighborhood',), num_layers=1, pooling='mean', mixers=options
  )
  mixer = model.stack.periods[0].blocks[0].mixer
  x = jax.random.normal(jax.random.key(0), (1, 16, mixer.out.weight.shape[-1]))
  reach = jax.jacobian(
    lambda x: mixer(x, Context(grid=model.grid))[0][0, 5].sum()
  )
  seen = np.abs(jax.jit(reach)(x)).max((0, 2)).reshape(4, 4) > 0
  wanted = np.zeros((4, 4), bool)
  wanted[:3, :3] = True
  np.testing.assert_array_equal(seen, wanted)
