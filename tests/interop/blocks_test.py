"""Our mixers against the blocks of Hugging Face transformers, on CPU.

Independent code with the same weights: the extra `oracle` installs it.
"""

import itertools

import jax
import numpy as np
import pytest

from efficient_attn.layers.context import Context
from tests.interop import oracles

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

B, T = 2, 37
LENGTHS = (5, 1, 20, 11)
PREFILL = 34
# Tokens of a step: theirs of a single token forgets the limits of dt.
STEPS = {'mamba2_groups': 3}
every_block = pytest.mark.parametrize('name', oracles.BLOCKS)


def pair(name):
  from tests.interop import blocks, compact_blocks, state_space_blocks

  modules = blocks, compact_blocks, state_space_blocks
  (builder,) = (m.BLOCKS[name] for m in modules if name in m.BLOCKS)
  return builder()


@every_block
def test_outputs(name):
  from tests.interop import compare

  p, x = pair(name), compare.inputs(T)
  y, _ = jax.jit(p.ours)(x)
  with torch.no_grad():
    expected = p.theirs(torch.from_numpy(x))
  assert compare.difference(y, expected) < compare.OUTPUTS


@every_block
def test_gradients_of_the_inputs(name):
  from tests.interop import compare

  # Not the numbers of the test above: on CPU only this takes the chunks.
  compare.check_gradients(pair(name), T)


@every_block
def test_packed_segments(name):
  from tests.interop import compare

  p, x = pair(name), compare.inputs(T)
  ids = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None].repeat(B, 0)
  y, _ = jax.jit(p.ours)(x, Context(segment_ids=ids))
  cuts = itertools.pairwise(np.cumsum((0, *LENGTHS)))
  with torch.no_grad():
    expected = [p.theirs(torch.from_numpy(x[:, a:b])) for a, b in cuts]
  assert compare.difference(y, torch.cat(expected, 1)) < compare.OUTPUTS


@every_block
def test_prefill_and_decode(name):
  from tests.interop import compare

  compare.check_decoding(
    pair(name), T, range(PREFILL, T + 1, STEPS.get(name, 1))
  )
