"""Mixers as their papers initialise them."""

from flax import nnx

from efficient_attn.layers.mixers import build_mixer
from efficient_attn.models import jit_init


def built(name, **options):
  """Returns `build_mixer(name, **options)`, drawn by one program."""
  return jit_init(lambda: build_mixer(name, rngs=nnx.Rngs(0), **options))()
