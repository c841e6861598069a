"""Directories of weights: what is read, what is refused, what is written."""

import dataclasses
import json
import os
import struct

import jax
import numpy as np
import pytest

pytest.importorskip('safetensors')

from safetensors.numpy import load_file

from efficient_attn import interop, sharding
from efficient_attn.config import ConfigError
from efficient_attn.interop import files
from efficient_attn.interop.family import differences
from tests.interop import directory as tiny


def same(found, wanted):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, strict=True)


def without(name):
  return {k: v for k, v in tiny.tensors().items() if k != name}


def half(path):
  file = path / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])


def header(size, text=b'{}'):
  def change(path):
    (path / 'model.safetensors').write_bytes(struct.pack('<Q', size) + text)

  return change


def index(file, tensor='model.norm.weight'):
  def change(path):
    names = dict.fromkeys(tiny.tensors(), 'model.safetensors')
    text = json.dumps({'weight_map': names | {tensor: file}})
    (path / files.INDEX).write_text(text)

  return change


def config(text):
  return lambda path: (path / 'config.json').write_text(text)


def remove(name):
  return lambda path: (path / name).unlink()


def words(**changed):
  return lambda path: tiny.write(path, **changed)


def tensor(**changed):
  return lambda path: tiny.write(path, tiny.tensors() | changed)


def gone(name):
  return lambda path: tiny.write(path, without(name))


NORM = 'model.norm.weight'
LENGTH = dict(max_position_embeddings='x')
BAD = {
  'no directory': (os.rmdir, 'no such directory'),
  'no config': (remove('config.json'), 'config.json: No such file'),
  'no JSON': (config('{'), 'config.json: not JSON'),
  'a list': (config('[]'), 'config.json: a JSON object is needed'),
  'no model_type': (config('{}'), 'config.json: it has no model_type'),
  'another family': (
    words(model_type='lama'),
    "model_type='lama' is unknown; did you mean 'llama'",
  ),
  'a number for a family': (words(model_type=3), 'model_type=3 is unknown'),
  'a word that is missing': (words(hidden_size='-'), 'it has no hidden_size'),
  'another word': (words(qk_lambda=3), 'qk_lambda=3 is not supported'),
  'another activation': (
    words(hidden_act='mish'),
    "hidden_act='mish' is not supported",
  ),
  'a list for a word': (
    words(hidden_act=['silu']),
    r"hidden_act=\['silu'\] is not supported",
  ),
  'another rope': (
    words(rope_scaling={'rope_type': 'su', 'factor': 2.0}),
    "rope_type='su' is not supported",
  ),
  'a word of another type': (
    words(hidden_size='big'),
    "model.d_model='big' is a str",
  ),
  'layers without end': (
    words(num_hidden_layers=10**9),
    'num_hidden_layers=1000000000, but the files hold 21 tensors',
  ),
  'no number of layers': (
    words(model_type='mistral', num_hidden_layers='2'),
    "num_hidden_layers='2' must be a whole number",
  ),
  'a list for a rope': (
    words(rope_scaling={'rope_type': ['linear']}),
    r"rope_type=\['linear'\] is not supported",
  ),
  'a rope that is no object': (
    words(rope_parameters='linear'),
    'rope_parameters must be an object',
  ),
  'a rope without a length': (
    words(rope_scaling=dict(rope_type='yarn', factor=None), **LENGTH),
    "max_position_embeddings='x' must be a whole number",
  ),
  'no scalar': (
    words(model_type='gemma2', query_pre_attn_scalar=0),
    'query_pre_attn_scalar=0 must be positive',
  ),
  'a negative scalar': (
    words(model_type='gemma2', query_pre_attn_scalar=-2),
    'query_pre_attn_scalar=-2 must be positive',
  ),
  'an interval of none': (
    words(model_type='smollm3', no_rope_layer_interval=0),
    'no_rope_layer_interval=0 must be a whole number from 1 on',
  ),
  'too few kinds of layers': (
    words(model_type='qwen2', layer_types=['full_attention']),
    'layer_types must be a list of num_hidden_layers=2 values',
  ),
  'another kind of layer': (
    words(model_type='qwen2', layer_types=['full_attention', {}]),
    'layer_types: {} is not supported',
  ),
  'quantised': (words(quantization_config={'bits': 4}), 'quantised weights'),
  'no weights': (remove('model.safetensors'), 'files there: none'),
  'a truncated file': (half, 'not a whole safetensors file'),
  'an empty file': (
    lambda path: (path / 'model.safetensors').write_bytes(b''),
    'not a whole safetensors file',
  ),
  'an oversized header': (header(2**40), 'not a whole safetensors file'),
  'a header that is no JSON': (header(2, b'[)'), 'not a whole safetensors'),
  'a file outside': (index('../x.safetensors'), 'not a file of this directory'),
  'an absolute file': (index('/x.safetensors'), 'not a file of this directory'),
  'a number for a file': (index(3), "'3' is not a file|No such file"),
  'a file that is missing': (index('x.safetensors'), 'No such file'),
  'a tensor of the index that is missing': (
    index('model.safetensors', 'x'),
    'x, which model.safetensors.index.json says is there, is missing',
  ),
  'a missing tensor': (gone(NORM), f'the tensor {NORM} is missing'),
  'no head': (gone('lm_head.weight'), 'the tensor lm_head.weight is missing'),
  'an extra tensor': (
    tensor(x=np.zeros(3, np.float32)),
    'the tensor x is not part of the model',
  ),
  'an extra layer': (
    words(num_hidden_layers=1),
    'model.layers.1.input_layernorm.weight and 8 more tensors are not part',
  ),
  'another shape': (
    tensor(**{NORM: np.zeros(9, np.float32)}),
    rf'{NORM} is \[9\], but config.json makes it \[8\]',
  ),
  'integers': (tensor(**{NORM: np.zeros(8, np.int32)}), 'has dtype I32'),
  'another dtype': (
    tensor(**{NORM: np.zeros(8, np.float16)}),
    f"{NORM} is float16, but config.json says dtype='float32'",
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(name, tmp_path):
  path = tiny.write(tmp_path / 'weights')
  change, message = BAD[name]
  if name == 'no directory':
    for file in path.iterdir():
      file.unlink()
  change(path)
  with pytest.raises(ConfigError, match=message) as error:
    interop.load(path)
  assert '\n' not in str(error.value)


def test_tensors_of_one_kind_need_one_dtype(tmp_path):
  name = 'model.layers.0.mlp.up_proj.weight'
  mixed = tiny.tensors()
  mixed[name] = mixed[name].astype(np.float16)
  path = tiny.write(tmp_path / 'weights', mixed, dtype='-')
  with pytest.raises(ConfigError, match='need one dtype'):
    interop.load(path, scan_layers=True)


@pytest.mark.parametrize('scan', [True, False])
def test_files_are_saved_as_they_were(scan, tmp_path):
  path = tiny.write(tmp_path / 'weights', bos_token_id=7)
  for name in ('tokenizer_config.json', 'LICENSE', 'generation_config.json'):
    (path / name).write_text(name)
  (path / 'other.py').write_text('')
  config, model = interop.load(path, scan_layers=scan)
  interop.save(config, model, tmp_path / 'saved')
  found = {file.name: file for file in (tmp_path / 'saved').iterdir()}
  assert found.keys() == {x.name for x in path.iterdir()} - {'other.py'}
  assert found['LICENSE'].read_text() == 'LICENSE'
  words = json.loads(found['config.json'].read_text())
  assert words == json.loads((path / 'config.json').read_text())
  same(load_file(found['model.safetensors']), tiny.tensors())


def test_bfloat16_stays_bfloat16(tmp_path):
  import ml_dtypes

  narrow = {k: v.astype(ml_dtypes.bfloat16) for k, v in tiny.tensors().items()}
  path = tiny.write(tmp_path / 'weights', narrow, dtype='bfloat16')
  config, model = interop.load(path)
  logits, _ = model(np.zeros((1, 3), np.int32))
  assert logits.dtype == np.float32 and np.isfinite(logits).all()
  interop.save(config, model, tmp_path / 'saved')
  same(load_file(tmp_path / 'saved' / 'model.safetensors'), narrow)


def test_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'SHARD', 5000)
  path = tiny.write(tmp_path / 'weights')
  interop.save(*interop.load(path), tmp_path / 'saved')
  names = sorted(x.name for x in (tmp_path / 'saved').glob('*.safetensors'))
  assert names[0] == f'model-00001-of-{len(names):05d}.safetensors'
  found = {}
  for name in names:
    found |= load_file(tmp_path / 'saved' / name)
  same(found, tiny.tensors())
  index = json.loads((tmp_path / 'saved' / files.INDEX).read_text())
  assert index['metadata']['total_size'] == sum(
    x.nbytes for x in found.values()
  )
  interop.save(*interop.load(tmp_path / 'saved'), tmp_path / 'again')
  same(
    load_file(tmp_path / 'saved' / names[0]),
    load_file(tmp_path / 'again' / names[0]),
  )


@pytest.mark.parametrize('scan', [True, False])
def test_a_mesh_holds_the_same_parameters(scan, tmp_path):
  path = tiny.write(tmp_path / 'weights')
  config, wanted = interop.load(path, scan_layers=scan)
  assert config.model.scan_layers == scan
  mesh = sharding.make_mesh('fsdp=2,tensor=2', jax.devices()[:4])
  _, found = interop.load(path, mesh, scan_layers=scan)
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
  for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('same_head', [True, False])
def test_a_head_in_the_file_beats_the_flag(same_head, tmp_path):
  found = tiny.tensors()
  if same_head:
    found['lm_head.weight'] = found['model.embed_tokens.weight']
  path = tiny.write(tmp_path / 'weights', found, tie_word_embeddings=True)
  config, model = interop.load(path)
  assert config.model.tie_embeddings == same_head
  if not same_head:
    interop.save(config, model, tmp_path / 'saved')
    words = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert words['tie_word_embeddings'] is False


def test_files_of_base_models_leave_the_prefix_out(tmp_path):
  found = {k.removeprefix('model.'): v for k, v in tiny.tensors().items()}
  model = interop.load(tiny.write(tmp_path / 'base', found))[1]
  wanted = interop.load(tiny.write(tmp_path / 'whole'))[1]
  for x, y in zip(*map(jax.tree.leaves, (model, wanted)), strict=True):
    np.testing.assert_array_equal(x, y)


def test_nothing_is_left_of_a_model_that_no_family_has(tmp_path):
  config, model = interop.load(tiny.write(tmp_path / 'weights'))
  changed = dataclasses.replace(config.model, norm='layernorm', norms={})
  config = dataclasses.replace(config, model=changed)
  with pytest.raises(ConfigError, match="model.norm='layernorm'"):
    interop.save(config, model, tmp_path / 'saved')
  assert {x.name for x in tmp_path.iterdir()} == {'weights'}


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
  config, model = interop.load(tiny.write(tmp_path / 'weights'))

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files, '_write', full)
  with pytest.raises(ConfigError, match='saved: No space left on device'):
    interop.save(config, model, tmp_path / 'saved')
  assert {x.name for x in tmp_path.iterdir()} == {'weights'}


def test_what_exists_is_not_overwritten(tmp_path):
  path = tiny.write(tmp_path / 'weights')
  config, model = interop.load(path)
  with pytest.raises(ConfigError, match='it exists'):
    interop.save(config, model, path)


def test_a_model_of_our_own_is_saved_as_the_first_family_that_has_it(tmp_path):
  path = tiny.write(tmp_path / 'weights')
  config, model = interop.load(path)
  config = dataclasses.replace(
    config, init_from=dataclasses.replace(config.init_from, run='')
  )
  interop.save(config, model, tmp_path / 'saved')
  words = json.loads((tmp_path / 'saved' / 'config.json').read_text())
  assert words['model_type'] == 'llama'
  assert words['architectures'] == ['LlamaForCausalLM']
  again, _ = interop.load(tmp_path / 'saved')
  assert not differences(again.model, config.model)


def test_names_of_tensors_that_are_not_read(tmp_path):
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  found = tiny.tensors() | {name: np.ones(1, np.float32)}
  interop.load(tiny.write(tmp_path / 'weights', found))
