"""Biases of the projections of every row that is softmax attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.layers.mixers import MIXERS, build_mixer, mixer_options
from tests.layers.built import filled

ROWS = [name for name in MIXERS if 'qkv_bias' in mixer_options(name)]


def build(name, **options):
  def call():
    return build_mixer(
      name,
      d_model=16,
      num_heads=2,
      causal=MIXERS[name].causal,
      rngs=nnx.Rngs(0),
      **options,
    )

  return call


def biases(name, **options):
  state = nnx.state(nnx.eval_shape(build(name, **options)), nnx.Param)
  paths = ['.'.join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
  return {path for path in paths if path.endswith('bias')}


@pytest.mark.parametrize('name', ROWS)
def test_rows_have_the_biases_that_are_asked_for(name):
  qkv = {f'qkv.{part}.bias' for part in ('query', 'key', 'value')}
  assert biases(name) == set()
  assert biases(name, qkv_bias=True) == qkv
  assert biases(name, out_bias=True) == {'out.bias'}


def test_biases_of_further_projections():
  assert biases('attention', shared_kv=True, qkv_bias=True) == {'query.bias'}
  found = nnx.eval_shape(
    lambda: build_mixer(
      'longformer',
      d_model=16,
      num_heads=2,
      causal=False,
      rngs=nnx.Rngs(0),
      global_projections=True,
      qkv_bias=True,
    )
  )
  assert all(
    projection.bias is not None
    for qkv in (found.qkv, found.global_qkv)
    for projection in (qkv.query, qkv.key, qkv.value)
  )


def test_biases_are_added():
  mixer = filled(build('attention', qkv_bias=True, out_bias=True))
  x = jax.random.normal(jax.random.key(0), (1, 5, 16))
  # All values are their bias, whatever the weights of attention are.
  mixer.qkv.value.weight[...] = jnp.zeros_like(mixer.qkv.value.weight[...])
  out = mixer.out
  wanted = jnp.einsum('nh,nhd->d', mixer.qkv.value.bias[...], out.weight[...])
  y, _ = mixer(x)
  np.testing.assert_allclose(
    y, jnp.broadcast_to(wanted + out.bias[...], y.shape), atol=1e-5
  )
  before, _ = filled(build('attention', qkv_bias=True))(x)
  for part in ('query', 'value'):
    changed = filled(build('attention', qkv_bias=True))
    getattr(changed.qkv, part).bias[...] += 1.0
    assert np.abs(changed(x)[0] - before).max() > 1e-3, part
