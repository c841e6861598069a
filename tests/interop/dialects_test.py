"""Weights of state-spaces/mamba, and Mamba-2 of fla, in their own words."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip('safetensors')

from flax import nnx
from safetensors.numpy import load_file, save_file

from efficient_attn import interop
from efficient_attn.config import Config, ConfigError
from efficient_attn.interop import files
from efficient_attn.interop.dialects import translated
from efficient_attn.interop.family import differences
from efficient_attn.models import build, parameter_count
from tests.interop import torch_archive as archive

MAMBA = dict(
  d_model=16,
  n_layer=2,
  vocab_size=21,
  ssm_cfg={},
  rms_norm=True,
  residual_in_fp32=True,
  fused_add_norm=True,
  pad_vocab_size_multiple=8,
)
MAMBA2 = MAMBA | dict(
  d_intermediate=0,
  ssm_cfg=dict(layer='Mamba2', d_state=8, headdim=8, ngroups=2),
  attn_layer_idx=[],
  attn_cfg={},
  pad_vocab_size_multiple=16,
  tie_embeddings=True,
)
FLA = dict(
  model_type='mamba2',
  architectures=['Mamba2ForCausalLM'],
  hidden_size=16,
  num_hidden_layers=2,
  vocab_size=24,
  head_dim=8,
  state_size=8,
  n_groups=1,
  num_heads=4,
  norm_eps=1e-4,
  dt_limit=[0.01, {'__float__': 'Infinity'}],
  rmsnorm=True,
  norm_before_gate=False,
  D_has_hdim=False,
  fuse_norm=True,
  tie_word_embeddings=False,
)
# What transformers would say.
SAME = {
  'mamba': (
    MAMBA,
    dict(model_type='mamba', hidden_size=16, num_hidden_layers=2)
    | dict(vocab_size=24, tie_word_embeddings=True, layer_norm_epsilon=1e-5),
  ),
  'mamba2': (
    MAMBA2,
    dict(model_type='mamba2', hidden_size=16, num_hidden_layers=2, expand=2)
    | dict(vocab_size=32, tie_word_embeddings=True, layer_norm_epsilon=1e-5)
    | dict(num_heads=4, head_dim=8, n_groups=2, state_size=8),
  ),
  'fla': (
    FLA,
    dict(model_type='mamba2', hidden_size=16, num_hidden_layers=2, expand=2)
    | dict(vocab_size=24, tie_word_embeddings=False, layer_norm_epsilon=1e-4)
    | dict(num_heads=4, head_dim=8, n_groups=1, state_size=8)
    | dict(time_step_limit=[0.01, float('inf')]),
  ),
}


def model_of(words):
  """Returns the config and a random model of words of transformers."""
  config = interop.FAMILIES[words['model_type']].read(words)
  model = build(config, rngs=nnx.Rngs(0))
  keys = iter(jax.random.split(jax.random.key(1), 100))
  graph, state = nnx.split(model)
  state = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), state)
  return config, nnx.merge(graph, state)


@pytest.mark.parametrize('name', SAME)
def test_a_directory(name, tmp_path):
  said, words = SAME[name]
  config, model = model_of(words)
  wanted_path, path = tmp_path / 'transformers', tmp_path / 'original'
  interop.save(Config(model=config), model, wanted_path)
  wanted = load_file(wanted_path / 'model.safetensors')
  path.mkdir()
  (path / 'config.json').write_text(json.dumps(said))
  if name == 'fla':
    save_file(wanted, path / 'model.safetensors')
  else:
    theirs = {
      key.replace('embeddings', 'embedding'): x for key, x in wanted.items()
    }
    theirs['lm_head.weight'] = theirs['backbone.embedding.weight']
    archive.save(path / 'pytorch_model.bin', theirs)
  assert files.is_weights(path)
  loaded, model = interop.load(path)
  assert not differences(loaded.model, config)
  interop.save(loaded, model, tmp_path / 'saved')
  found = load_file(tmp_path / 'saved' / 'model.safetensors')
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_array_equal(found[key], value, strict=True)
  saved = json.loads((tmp_path / 'saved' / 'config.json').read_text())
  family = interop.FAMILIES[saved['model_type']]
  assert not differences(family.read(saved), config)


@pytest.mark.parametrize(
  'base, words, said',
  [
    (MAMBA, dict(rms_norm=False), 'rms_norm=False is not supported'),
    (MAMBA, dict(ssm_cfg=None), 'ssm_cfg=None must be'),
    (MAMBA, dict(ssm_cfg={'layer': 'Mamba3'}), "ssm_cfg.layer='Mamba3'"),
    (MAMBA, dict(ssm_cfg={'d_sate': 3}), 'did you mean .d_state'),
    (MAMBA, dict(vocab_size=2.5), 'vocab_size=2.5'),
    (MAMBA, dict(pad_vocab_size_multiple=0), 'pad_vocab_size_multiple=0'),
    (MAMBA2, dict(attn_layer_idx=[1]), 'attn_layer_idx'),
    (MAMBA2, dict(d_intermediate=32), 'd_intermediate=32'),
    (MAMBA2, dict(ssm_cfg={'layer': 'Mamba2', 'headdim': 0}), 'head_dim=0'),
    (MAMBA2, dict(ssm_cfg={'layer': 'Mamba2', 'rmsnorm': False}), 'rmsnorm'),
    (FLA, dict(D_has_hdim=True), 'D_has_hdim=True'),
    (FLA, dict(norm_before_gate=True), 'norm_before_gate=True'),
    (FLA, dict(norm='x'), "norm='x'"),
  ],
)
def test_other_words_are_refused(base, words, said, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(base | words))
  with pytest.raises(ConfigError, match=said):
    interop.load(tmp_path)


# Of the files on the Hub.
@pytest.mark.parametrize(
  'count, words',
  [
    (2_768_345_600, dict(d_model=2560, n_layer=64, vocab_size=50277)),
    (
      2_702_599_680,
      dict(d_model=2560, n_layer=64, vocab_size=50277)
      | dict(ssm_cfg={'layer': 'Mamba2'}, pad_vocab_size_multiple=16),
    ),
  ],
  ids=['mamba-2.8b', 'mamba2-2.7b'],
)
def test_parameters_of_published_models(count, words):
  words = translated(MAMBA | words)
  config = interop.FAMILIES[words['model_type']].read(words)
  assert parameter_count(config) == count
