"""Checkpoints written by an earlier version still load and mean the same.

`tests/fixtures/<family>` is a run of two steps whose layers are the causal
mixers of a family, as the version of format 0 wrote it, and `outputs.npz` what
that version computed: the logits, and the output of each mixer on one input.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.formats import renamed
from efficient_attn.layers.mixers import MIXERS
from efficient_attn.train.load import load_model

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
FAMILIES = sorted(path.name for path in FIXTURES.iterdir())


def blocks(model):
  return [block for period in model.stack.periods for block in period.blocks]


def test_every_causal_mixer_of_the_format_has_a_fixture():
  found = set()
  for family in FAMILIES:
    with np.load(FIXTURES / family / 'outputs.npz') as stored:
      found |= set(stored) - {'logits'}
  found = {renamed(name) or name for name in found}
  assert len(found) == 73 and found <= {n for n in MIXERS if MIXERS[n].causal}


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_are_those_stored(family):
  config, model = load_model(FIXTURES / family)
  tokens = jnp.arange(48).reshape(2, 24) % 32
  logits = jax.jit(lambda model: model(tokens)[0])(model)
  with np.load(FIXTURES / family / 'outputs.npz') as stored:
    wanted = dict(stored)
  if not close(logits, wanted['logits']):
    each = zip(config.model.pattern, blocks(model), strict=True)
    wrong = [name for name, b in each if not close(output(b), wanted[name])]
    pytest.fail(f'other logits of {family}; other outputs of {wrong}')


def output(block):
  x = np.random.default_rng(0).standard_normal((2, 24, 16))
  mix = jax.jit(lambda mixer, x: mixer(x)[0])
  return mix(block.mixer, jnp.asarray(x, jnp.float32))


def close(found, wanted):
  return np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
