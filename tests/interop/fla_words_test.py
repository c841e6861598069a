"""Words and names of flash-linear-attention: what is read, and refused."""

import json

import numpy as np
import pytest

pytest.importorskip('safetensors')

from safetensors.numpy import load_file, save_file

from efficient_attn import interop
from efficient_attn.config import Config, ConfigError
from efficient_attn.models import parameter_count
from tests.interop.round_trip_test import FLA, HEADS, arrays, random_model


def attn(**words):
  return dict(attn=dict(layers=[1], num_heads=2) | words)


REFUSED = {
  'grouped heads': ('gla', FLA | dict(num_kv_heads=1), 'num_kv_heads=1'),
  'no gate': ('gla', FLA | dict(use_output_gate=False), 'use_output_gate'),
  'names': ('gla', FLA | dict(fuse_norm=False), 'fuse_norm=False'),
  'clamped': ('gla', FLA | dict(clamp_min=-3.0), 'clamp_min=-3.0'),
  'norm': ('retnet', FLA | dict(elementwise_affine=False), 'elementwise_aff'),
  'half keys': ('retnet', FLA | dict(expand_k=0.5), 'expand_k=0.5'),
  'activation': ('gsa', FLA | dict(feature_map='relu'), 'feature_map'),
  'bounds': ('hgrn2', FLA | dict(expand_ratio=8), 'use_lower_bound=True'),
  'widths': (
    'hgrn2',
    FLA | dict(use_lower_bound=False, expand_ratio=4),
    'expand_ratio=4 and num_heads=2',
  ),
  'query norm': ('delta_net', FLA | dict(qk_norm='sum'), "qk_norm='sum'"),
  'safe gate': (
    'kda',
    HEADS | dict(safe_gate=True),
    'safe_gate=True and lower_bound=None',
  ),
  'growing': (
    'kda',
    HEADS | dict(safe_gate=True, lower_bound=5),
    'lower_bound=5.0 must be',
  ),
  'residuals': ('kda', HEADS | dict(attnres_block_size=2), 'attnres'),
  'powers': ('kda', HEADS | dict(hidden_act='powlu'), 'hidden_act'),
  'text': ('kda', HEADS | dict(head_dim='x'), 'head_dim='),
  'none': ('comba', HEADS | dict(expand_v=0), 'expand_v=0'),
  'value heads': ('comba', HEADS | dict(num_v_heads=4), 'num_v_heads=4'),
  'behind': ('gla', FLA | attn(layers=[3]), 'attn.layers: 3'),
  'twice': ('gla', FLA | attn(layers=[1, 1]), 'attn.layers: 1'),
  'no list': ('gla', FLA | attn(layers=1), 'attn.layers=1'),
  'no heads': ('gla', FLA | dict(attn=dict(layers=[1])), 'num_heads'),
  'a word of attention': ('gla', FLA | attn(qk_norm=True), 'qk_norm'),
  'no object': ('gla', FLA | dict(attn=3), 'attn=3'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_supported(name):
  family, words, said = REFUSED[name]
  with pytest.raises(ConfigError, match=said):
    interop.FAMILIES[family].read(words)


def save(words, name, path):
  """Writes a random model, and returns it and its tensors."""
  config = interop.FAMILIES[name].read(words)
  model = random_model(config)
  interop.save(Config(model=config), model, path / 'first')
  folder = path / 'second'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(words | {'model_type': name}))
  return model, load_file(path / 'first' / 'model.safetensors'), folder


@pytest.mark.parametrize(
  'name, words, old',
  [
    ('delta_net', FLA, lambda key: key.replace('attn.o_norm', 'attn.norm')),
    ('gated_deltanet', HEADS, None),
  ],
)
def test_names_of_older_files(name, words, old, tmp_path):
  model, tensors, folder = save(words, name, tmp_path)
  if old is None:
    tensors['model.layers.0.attn.D'] = np.zeros(2, np.float32)
  else:
    renamed = {old(key): x for key, x in tensors.items()}
    assert renamed.keys() != tensors.keys()
    tensors = renamed
  save_file(tensors, folder / 'model.safetensors')
  found, wanted = (
    arrays(interop.load(folder, scan_layers=True)[1]),
    arrays(model),
  )
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_array_equal(found[key], value, strict=True)


def test_one_kind_of_attention_may_follow_another():
  words = FLA | dict(
    num_hidden_layers=4,
    attn=[
      dict(layers=[1], num_heads=4, num_kv_heads=2),
      dict(layers=[3], num_heads=2, window_size=5),
    ],
  )
  config = interop.FAMILIES['gla'].read(words)
  assert config.pattern == ('gla', 'attention', 'gla', 'window:1')
  written = interop.FAMILIES['gla'].write(config)
  assert [spec['layers'] for spec in written['attn']] == [[1], [3]]


def test_widths_that_follow_from_others():
  """The default of fla's Gated DeltaNet is 1.3 billion parameters."""
  config = interop.FAMILIES['gated_deltanet'].read(dict(num_hidden_layers=21))
  assert config.ffn_dim == 5632
  mixer = 2048 * (2 * 1536 + 3 * 3072) + 4 * (2 * 1536 + 3072)
  mixer += 2 * 2048 * 6 + 2 * 6 + 512
  layer = mixer + 3 * 2048 * 5632 + 2 * 2048
  assert parameter_count(config) == 21 * layer + 2 * 32000 * 2048 + 2048
