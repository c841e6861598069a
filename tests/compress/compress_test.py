"""Quantised and pruned weights: by hand, in every stacking."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models
from efficient_attn.compress.prune import largest, pruned
from efficient_attn.compress.quantize import FORMATS, quantized, stored_bytes
from efficient_attn.config import ConfigError, LMConfig
from tests.layers.built import filled

SIZES = dict(d_model=16, num_heads=2, num_layers=4, vocab_size=32)
CHANGES = {name: functools.partial(quantized, name=name) for name in FORMATS}
CHANGES['pruned'] = functools.partial(pruned, share=0.5)


def model_of(**options):
  config = LMConfig(**SIZES | options)
  return filled(lambda: models.build(config, rngs=nnx.Rngs(0)))


def arrays(model):
  """Arrays by path."""
  return {
    '.'.join(map(str, path)): np.asarray(p[...])
    for path, p in nnx.to_flat_state(nnx.state(model))
  }


@pytest.mark.parametrize('name', CHANGES)
def test_layers_of_a_scan_change_as_they_would_alone(name):
  model = model_of()
  changed = CHANGES[name](model)
  assert (arrays(changed)['embed.table'] != arrays(model)['embed.table']).any()
  one = model_of(num_layers=1)
  for block, alone in zip(
    changed.stack.layers(), model.stack.layers(), strict=True
  ):
    one.stack.periods[0].blocks[0] = alone
    (wanted,) = CHANGES[name](one).stack.layers()
    for path, x in arrays(wanted).items():
      np.testing.assert_array_equal(arrays(block)[path], x)
      before = arrays(alone)[path]
      assert (x == before).all() == ('norm' in path), path
  tokens = jnp.arange(6)[None]
  assert jnp.isfinite(jax.jit(lambda m: m(tokens)[0])(changed)).all()


@pytest.mark.parametrize('name', ['int8', 'int4', 'pruned'])
def test_experts_are_matrices_apart(name):
  model = model_of(num_layers=2, ffn='moe', ffn_dim=8)
  before = CHANGES[name](model).stack.periods.blocks[0].ffn.up.weight[...]
  weight = model.stack.periods.blocks[0].ffn.up.weight
  weight[...] = weight[...].at[:, 1].multiply(100)
  after = CHANGES[name](model).stack.periods.blocks[0].ffn.up.weight[...]
  others = np.delete(np.arange(8), 1)
  np.testing.assert_array_equal(after[:, others], before[:, others])
  assert (after[:, 1] != before[:, 1]).any()


def test_a_matrix_is_pruned_as_a_whole():
  model = model_of(num_layers=1)
  after = arrays(pruned(model, 0.75))
  for path, x in arrays(model).items():
    if 'norm' not in path:
      kept = abs(x) >= np.quantile(abs(x), 0.75)
      np.testing.assert_array_equal(after[path], np.where(kept, x, 0))


def test_a_group_lies_along_the_inputs():
  model = model_of(num_layers=1, ffn='mlp', ffn_dim=160)
  before = arrays(model)['stack.periods.0.blocks.0.ffn.down.weight']
  after = arrays(quantized(model, 'int4'))[
    'stack.periods.0.blocks.0.ffn.down.weight'
  ]
  for column in (0, 7):
    for rows in (slice(0, 128), slice(128, 160)):
      x = before[rows, column]
      step = np.abs(x).max() / 7
      wanted = np.round(x / step) * step
      np.testing.assert_allclose(after[rows, column], wanted, atol=1e-6)
  # All inputs of an output channel: two heads of eight.
  path = 'stack.periods.0.blocks.0.mixer.out.weight'
  before, after = arrays(model)[path], arrays(quantized(model, 'int8'))[path]
  step = np.abs(before).max((0, 1)) / 127
  np.testing.assert_allclose(after, np.round(before / step) * step, atol=1e-6)


def test_bytes_by_hand():
  model = models.abstract(
    LMConfig(d_model=8, num_heads=2, num_layers=2, vocab_size=32, ffn='none')
  )
  matrix, table, vectors = 2 * 4 * 64, 32 * 8, 3 * 8
  assert stored_bytes(model, 'float16') == 2 * (matrix + table + vectors)
  scales = 4 * (2 * 4 * 8 + 32)  # an output channel each
  assert stored_bytes(model, 'int8') == matrix + table + 2 * vectors + scales
  half = (matrix + table) / 2 + 2 * vectors
  assert stored_bytes(model, 'int4') == half + scales / 2
  left = stored_bytes(model, 'uint4', embeddings=False)
  assert left == matrix / 2 + 4 * 64 + 2 * (table + vectors)


def test_the_largest_stay():
  x = np.random.default_rng(0).standard_normal((3, 4, 5))
  for share, count in ((0, 20), (0.5, 10), (0.75, 5), (0.99, 1)):
    kept = np.asarray(largest(x, share, 1))
    assert (kept.sum((1, 2)) == count).all()
    for size, mask in zip(abs(x), kept, strict=True):
      assert size[mask].min() >= size[~mask].max(initial=0)
  assert largest(x, 0.5).sum() == 30
  with pytest.raises(ConfigError, match='share=1 '):
    largest(x, 1)


def test_an_unknown_format():
  with pytest.raises(ConfigError, match="format='int5'"):
    quantized(model_of(num_layers=1), 'int5')
