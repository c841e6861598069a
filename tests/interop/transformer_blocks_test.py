"""Whole blocks, with biases and both forms of gelu, against transformers."""

import pytest

from tests.interop import oracles

pytest.importorskip('torch')
pytest.importorskip('transformers')


@pytest.mark.parametrize('name', oracles.TRANSFORMER_BLOCKS)
def test_outputs_and_gradients_of_the_inputs(name):
  from tests.interop import compare, transformer_blocks

  compare.check_gradients(transformer_blocks.BLOCKS[name](), 17)
