"""Our mixers against modules of several libraries, on CPU."""

import importlib.util
import os
import warnings

import pytest

from tests.interop import oracles

pytest.importorskip('torch')

os.environ['KERAS_BACKEND'] = 'torch'
T = 40


def build(name):
  package = oracles.LIBRARY_BLOCKS[name].package
  module = package.replace('-', '_')
  if importlib.util.find_spec(module) is None:
    pytest.skip(f'{package} is not installed')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of what it imports itself
    importlib.import_module(module)
  from tests.interop import library_blocks, memory_blocks, xlstm_blocks

  blocks = library_blocks.BLOCKS | memory_blocks.BLOCKS | xlstm_blocks.BLOCKS
  return blocks[name](T)


@pytest.mark.parametrize('name', oracles.LIBRARY_BLOCKS)
def test_outputs_and_gradients_of_the_inputs(name):
  from tests.interop import compare

  compare.check_gradients(build(name), T)


def test_compressive_in_segments():
  from tests.interop import compare

  pair = build('compressive')
  compare.check_decoding(pair, T, range(8, T + 1, 8), batch=2)
