"""Vision transformer (Dosovitskiy et al. 2010.11929) with any mixer."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ViTConfig
from efficient_attn.layers.context import Context
from efficient_attn.layers.dropout import dropout
from efficient_attn.layers.mixer import OnGrid
from efficient_attn.layers.norm import norm_of
from efficient_attn.layers.param import Projection, param
from efficient_attn.layers.stack import Stack
from efficient_attn.ops.positions import sincos_2d
from efficient_attn.values import under


class ViT(nnx.Module):
  """Maps images to class logits: patches, bidirectional blocks, pooling."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    patch, d_model = config.patch_size, config.d_model
    side = config.image_size // patch
    self.embed = Projection(
      {'patch': patch * patch * config.channels},
      {'embed': d_model},
      bias=True,
      rngs=rngs,
    )
    if config.position == 'learned':
      rows = 0.02 * jax.random.normal(rngs.params(), (side * side, d_model))
      self.position = param(rows, (None, None), weight_decay=False)
    else:
      self.position = None
    if config.pooling == 'cls':
      # Not zero: a gated mixer would keep a zero token at zero for ever.
      cls = 0.02 * jax.random.normal(rngs.params(), (d_model,))
      self.cls = param(cls, (None,))
    else:
      self.cls = None
    self.stack = Stack(config, causal=False, rngs=rngs)
    # A class token stands in no place of the grid.
    self.grid = (side, side) if self.cls is None else ()
    for block in self.stack.blocks():
      if isinstance(block.mixer, OnGrid):
        with under(f'model.mixers.{block.name}'):
          block.mixer.check_grid(self.grid)
    self.norm = norm_of(config)(d_model)
    self.head = Projection(
      {'embed': d_model},
      {'classes': config.num_classes},
      bias=True,
      init=lambda key, shape, fan_in: jnp.zeros(shape),
      rngs=rngs,
    )
    self.image_shape = (config.image_size, config.image_size, config.channels)
    self.patch_size = patch
    self.dropout = config.dropout
    self.dtype = jnp.dtype(config.dtype)

  def __call__(self, image, *, key=None):
    """Maps float images [B, H, W, channels] to float32 logits [B, classes].

    `key` is a PRNG key for dropout; None to not drop.
    """
    if image.shape[1:] != self.image_shape:
      raise ValueError(
        f'images are {image.shape[1:]} but the model was built for '
        f'{self.image_shape}; set model.image_size and model.channels'
      )
    cut = functools.partial(patches, size=self.patch_size)
    cut = sharding.local_op(cut, ('BHWC',), 'BTX')
    x = self.embed(cut(image.astype(self.dtype)))
    side = self.image_shape[0] // self.patch_size
    if self.position is None:
      rows = sincos_2d(side, side, x.shape[-1])
    else:
      rows = self.position[...]
    x = x + rows.astype(x.dtype)
    if self.cls is not None:
      cls = jnp.zeros_like(x[:, :1]) + self.cls[...].astype(x.dtype)
      x = jnp.concatenate([cls, x], axis=1)
    keys = (None, None) if key is None else jax.random.split(key)
    x = dropout(x, self.dropout, keys[0])
    x, _ = self.stack(x, Context(grid=self.grid), key=keys[1])
    x = self.norm(x)
    x = x[:, 0] if self.cls is not None else jnp.mean(x, axis=1)
    return self.head(x).astype(jnp.float32)


def patches(image: jax.Array, size: int) -> jax.Array:
  """Cuts [B, H, W, C] into row-major patches [B, H W / size^2, size^2 C]."""
  b, h, w, c = image.shape
  x = image.reshape(b, h // size, size, w // size, size, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, (h // size) * (w // size), size * size * c)
