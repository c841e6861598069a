"""Models of flash-linear-attention: it writes, reads and agrees, in float32."""

import functools
import json

import jax
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('fla')

import torch
import transformers
from safetensors.numpy import load_file

from efficient_attn import interop
from efficient_attn.interop.family import differences
from tests.interop import fla_models

# What may train better, says theirs.
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

T = 20


@functools.cache
def theirs(case):
  return fla_models.make(case)


@pytest.fixture(scope='module', params=fla_models.CASES)
def case(request, tmp_path_factory):
  """Returns a case, its directory, and our config and model of it."""
  directory = tmp_path_factory.mktemp(request.param)
  theirs(request.param).save_pretrained(directory)
  return request.param, directory, *interop.load(directory)


def test_logits(case):
  name, _, _, model = case
  tokens = np.random.default_rng(0).integers(1, fla_models.V, (2, T))
  wanted = fla_models.logits(theirs(name), torch.tensor(tokens)).numpy()
  found = jax.jit(lambda x: model(x)[0])(tokens)
  assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-4


def test_saved_tensors_are_those_that_were_loaded(case, tmp_path):
  name, directory, config, model = case
  interop.save(config, model, tmp_path / 'saved')
  wanted, found = (
    load_file(path / 'model.safetensors')
    for path in (directory, tmp_path / 'saved')
  )
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_array_equal(found[key], value, strict=True, err_msg=key)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'saved')
  wanted = theirs(name).state_dict()
  for key, value in again.state_dict().items():
    assert torch.equal(value, wanted[key]), key


def test_words_are_written_without_a_source(case, tmp_path):
  name, _, config, _ = case
  model_type = name.partition('-')[0]
  family = interop.FAMILIES[model_type]
  words = family.write(config.model) | {'model_type': model_type}
  (tmp_path / 'config.json').write_text(json.dumps(words))
  said = transformers.AutoConfig.from_pretrained(tmp_path)
  said.save_pretrained(tmp_path)
  again = json.loads((tmp_path / 'config.json').read_text())
  assert not differences(family.read(again), config.model)
