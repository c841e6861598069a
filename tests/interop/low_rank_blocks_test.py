"""The low-rank family against the blocks of transformers, on CPU."""

import pytest

from tests.interop import oracles

pytest.importorskip('torch')
pytest.importorskip('transformers')

T = 36


@pytest.mark.parametrize('name', oracles.LOW_RANK_BLOCKS)
def test_outputs_and_gradients_of_the_inputs(name):
  from tests.interop import compare, low_rank_blocks

  # Landmarks of theirs divide the length; pools need not.
  length = T + 1 if 'funnel' in name else T
  compare.check_gradients(low_rank_blocks.BLOCKS[name](length), length)


def test_transformer_xl_with_its_memory():
  from tests.interop import compare, low_rank_blocks

  pair = low_rank_blocks.BLOCKS['transformer_xl'](T)
  compare.check_decoding(pair, T, (20, 33, 34, 35, T), batch=2)
