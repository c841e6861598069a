"""The vision transformer with every mixer that can be bidirectional."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models
from efficient_attn.config import ConfigError, ViTConfig
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
  'neighborhood': dict(grid=(4, 4), window=3),
  'radial': dict(frame_size=16),
  'sinkhorn': dict(block_size=4),  # divides 16 patches
  'sliding_tile': dict(grid=(4, 4), tile=2),
  'vsa': dict(grid=(4, 4), cube=(2, 2)),
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


@pytest.mark.parametrize('mixer', ['neighborhood', 'sliding_tile', 'vsa'])
def test_a_mixer_of_grids_does_not_take_patches_for_a_line(mixer):
  with pytest.raises(ConfigError, match=r'set it to \(4, 4\)'):
    build(pattern=('attention', mixer), pooling='mean')


def test_an_image_is_whole_frames():
  model = build(pattern=('radial',), pooling='mean')
  with pytest.raises(ConfigError, match='T is 16, .* of frame_size=256'):
    model(IMAGE)
