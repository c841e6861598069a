"""Our mixers against layers of flash-linear-attention, on CPU."""

import pytest

from tests.interop import oracles

pytest.importorskip('torch')
pytest.importorskip('fla')
# Of theirs: how they call PyTorch, and that RWKV's author has his own code.
pytestmark = pytest.mark.filterwarnings(
  'ignore:.*use_reentrant:UserWarning', 'ignore:According to Bo:UserWarning'
)

T = 40


@pytest.mark.parametrize('name', oracles.FLA_BLOCKS)
def test_outputs_and_gradients_of_the_inputs(name):
  from tests.interop import compare, fla_blocks, fla_delta_blocks

  blocks = fla_blocks.BLOCKS | fla_delta_blocks.BLOCKS
  compare.check_gradients(blocks[name](T), T)
