"""Sparse and biased attention against the blocks of transformers, on CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import oracles

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

T = 40
DECODERS = ('bloom', 'gemma2', 't5_decoder')


@pytest.mark.parametrize('name', oracles.PATTERN_BLOCKS)
def test_outputs_and_gradients_of_the_inputs(name):
  from tests.interop import compare, pattern_blocks

  compare.check_gradients(pattern_blocks.BLOCKS[name](T), T)


@pytest.mark.parametrize('name', DECODERS)
def test_prefill_and_decode(name):
  from tests.interop import compare, pattern_blocks

  pair = pattern_blocks.BLOCKS[name](T)
  compare.check_decoding(pair, T, (30, *range(37, T + 1)), batch=2)


def test_buckets_of_t5_at_every_distance():
  from transformers.models.t5.modeling_t5 import T5Attention

  from efficient_attn.ops import scores

  distances = np.r_[-2000:2000]
  for bidirectional in (False, True):
    for buckets, most in ((32, 128), (16, 64), (64, 800)):
      table = jnp.arange(float(buckets))[:, None]
      score = scores.T5(table, bidirectional, most)
      found = score.by_distance(jnp.asarray(distances)[None])[0, 0]
      expected = T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional, buckets, most
      )
      np.testing.assert_array_equal(found, expected)
