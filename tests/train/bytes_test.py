"""Bits per byte: over the bytes of the text, whatever the tokens are."""

import jax.numpy as jnp
import numpy as np

from efficient_attn import config as configs
from efficient_attn.data import load_tokenizer
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.objectives.sums import means
from tests.train.objectives_test import LogitsModel


def _bits_per_byte(batch, tokenizer=None):
  config = configs.resolve({'model': {'name': 'lm', 'd_model': 8}})

  uniform = LogitsModel(jnp.zeros(256))
  sums = make_objective(config, tokenizer)(uniform, batch, None)
  return means(sums).get('bits_per_byte')


def test_bytes_of_the_batch_count():
  batch = {
    'tokens': jnp.array([[1, 2, 3, 0, 4]]),
    'segment_ids': jnp.array([[1, 1, 1, 1, 2]]),
    'positions': jnp.arange(5)[None],
  }
  sizes = jnp.array([[9, 3, 2, 0, 7]])  # the first and the last are no targets
  found = _bits_per_byte(batch | {'bytes': sizes})
  np.testing.assert_allclose(found, 3 * 8 / 5, rtol=1e-6)
  # Of bytes, the end of a document is none of the text.
  found = _bits_per_byte(batch, load_tokenizer('bytes'))
  np.testing.assert_allclose(found, 3 * 8 / 2, rtol=1e-6)
  assert _bits_per_byte(batch) is None
