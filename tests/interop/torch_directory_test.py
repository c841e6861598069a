"""Directories of weights whose files are PyTorch's."""

import json

import numpy as np
import pytest

pytest.importorskip('safetensors')

from safetensors.numpy import load_file, save_file

from efficient_attn import interop
from efficient_attn.config import ConfigError
from efficient_attn.interop import files
from tests.interop import directory as tiny
from tests.interop import torch_archive as archive


@pytest.fixture
def folder(tmp_path):
  """Returns a directory of Llama weights in one file of PyTorch."""
  path = tiny.write(tmp_path / 'llama')
  (path / 'model.safetensors').unlink()
  archive.save(path / 'pytorch_model.bin', tiny.tensors())
  return path


def parts(path):
  """Splits the file into two with an index."""
  tensors, index = tiny.tensors(), {}
  for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
    name = f'pytorch_model-{i + 1:05d}-of-00002.bin'
    archive.save(path / name, {key: tensors[key] for key in names})
    index |= dict.fromkeys(names, name)
  (path / files.TORCH_INDEX).write_text(json.dumps({'weight_map': index}))
  (path / 'pytorch_model.bin').unlink()


def whole(path):
  pass


@pytest.mark.parametrize('change', [whole, parts])
def test_they_are_saved_as_safetensors(change, folder, tmp_path):
  change(folder)
  config, model = interop.load(folder)
  interop.save(config, model, tmp_path / 'saved')
  found = load_file(tmp_path / 'saved' / 'model.safetensors')
  wanted = tiny.tensors()
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, strict=True)


@pytest.mark.parametrize('change', [whole, parts])
def test_safetensors_come_first(change, folder):
  change(folder)
  zeros = {name: 0 * x for name, x in tiny.tensors().items()}
  save_file(zeros, folder / 'model.safetensors')
  for tensor in files.open_tensors(folder).values():
    assert not tensor.map().any()


def test_numbers_that_are_no_weights_are_refused(folder):
  tree = {'a': archive.tensor('0', (), (), count=1, storage='LongStorage')}
  archive.write(folder / 'pytorch_model.bin', tree, {'0': np.int64([1])})
  with pytest.raises(ConfigError, match='a has dtype int64'):
    interop.load(folder)


def test_an_index_of_other_files_is_refused(folder):
  parts(folder)
  names = dict.fromkeys(tiny.tensors(), '../llama/pytorch_model.bin')
  index = json.dumps({'weight_map': names})
  (folder / files.TORCH_INDEX).write_text(index)
  with pytest.raises(ConfigError, match='not a file of this directory'):
    interop.load(folder)
