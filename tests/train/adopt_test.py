"""Published weights become runs, initial values and published weights again."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip('safetensors')

from safetensors.numpy import load_file

from efficient_attn import interop, sharding
from efficient_attn.config import ConfigError, InitConfig
from efficient_attn.train.adopt import adopt, publish
from efficient_attn.train.check import check
from efficient_attn.train.init_from import initial_values
from efficient_attn.train.load import load_model, open_run
from tests.interop import directory as tiny


def test_a_run_of_weights_is_an_ordinary_run(tmp_path):
  weights = tiny.write(tmp_path / 'weights')
  (weights / 'LICENSE').write_text('free')
  workdir = adopt(weights, tmp_path / 'run')
  config, model = load_model(workdir)
  check(config)
  wanted = interop.load(weights, scan_layers=True)[1]
  for x, y in zip(*map(jax.tree.leaves, (model, wanted)), strict=True):
    np.testing.assert_array_equal(x, y)
  publish(workdir, tmp_path / 'published')
  found = load_file(tmp_path / 'published' / 'model.safetensors')
  for name, value in tiny.tensors().items():
    np.testing.assert_array_equal(found[name], value)
  assert (tmp_path / 'published' / 'LICENSE').read_text() == 'free'
  with pytest.raises(ConfigError, match='a run is there'):
    adopt(weights, workdir)


def test_a_model_begins_with_weights(tmp_path):
  weights = tiny.write(tmp_path / 'weights')
  plain = open_run(weights).config
  options = plain.model.mixers['attention'] | {'qk_norm': True}
  changed = dataclasses.replace(
    plain.model, mixers={'attention': options}, scan_layers=False
  )
  initial = InitConfig(run=str(weights), new=('*.mixer.*_norm.scale',))
  checked = check(dataclasses.replace(plain, model=changed, init_from=initial))
  mesh = sharding.make_mesh('data=1', jax.devices()[:1])
  given = initial_values(checked.source, mesh)
  state = checked.architecture.init(
    checked.config, checked.optimizer, mesh, given
  )
  found = state.params['stack']['periods'][1]['blocks'][0]['mixer']['qkv']
  wanted = tiny.tensors()['model.layers.1.self_attn.q_proj.weight']
  np.testing.assert_array_equal(
    np.asarray(found['query']['weight']).reshape(8, 8).T, wanted
  )


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
  few = tiny.tensors(vocab_size=99)
  weights = tiny.write(tmp_path / 'weights', few, vocab_size=99)
  with pytest.raises(ConfigError, match='vocab_size=99 is below the 256'):
    adopt(weights, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
