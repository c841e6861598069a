"""Published families: transformers writes, reads and agrees, in float32."""

import fnmatch
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

import torch
from safetensors.numpy import load_file

from efficient_attn import interop
from efficient_attn.decode.generate import generate
from efficient_attn.interop.family import differences
from tests.interop import published, recurrent_cases

B, T, NEW = 2, 24, 8
LENGTHS = (24, 17)  # of the rows of a padded batch


CASES = published.CASES | recurrent_cases.CASES


@functools.cache
def theirs(case):
  return published.make(case, CASES[case])


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
  """Returns a case, its directory, and our config and model of it."""
  directory = tmp_path_factory.mktemp(request.param)
  theirs(request.param).save_pretrained(directory)
  # The harder of the two layouts.
  return request.param, directory, *interop.load(directory, scan_layers=True)


def tokens():
  return np.random.default_rng(0).integers(1, published.V, (B, T))


def relative(found, wanted):
  return np.abs(found - wanted).max() / np.abs(wanted).max()


def padded(lengths=LENGTHS):
  """Returns ids, 1 at tokens of rows that end together."""
  return (np.arange(T) >= T - np.array(lengths)[:, None]).astype(np.int32)


def test_logits(case):
  name, _, _, model = case
  with torch.no_grad():
    wanted = theirs(name)(torch.tensor(tokens())).logits.numpy()
  found = jax.jit(lambda x: model(x)[0])(tokens())
  assert relative(found, wanted) < 1e-4


def test_padded_logits(case):
  name, _, _, model = case
  if name in recurrent_cases.LEAKING:
    pytest.skip('their padding reaches tokens')
  ids = padded()
  with torch.no_grad():
    wanted = theirs(name)(
      torch.tensor(tokens()),
      attention_mask=torch.tensor(ids),
      position_ids=torch.tensor((ids.cumsum(1) - 1).clip(0)),
    ).logits.numpy()
  run = jax.jit(lambda x, ids: model(x, segment_ids=ids)[0])
  found = run(tokens(), ids)
  assert relative(found[ids == 1], wanted[ids == 1]) < 1e-4


def test_greedy_tokens(case):
  name, _, _, model = case
  lengths = (T, T) if name in recurrent_cases.LEAKING else LENGTHS
  wanted = theirs(name).generate(
    torch.tensor(tokens()),
    attention_mask=torch.tensor(padded(lengths)),
    max_new_tokens=NEW,
    do_sample=False,
    use_cache=name not in recurrent_cases.UNCACHED,
    pad_token_id=0,
  )
  found = generate(
    model,
    jnp.asarray(tokens(), jnp.int32),
    jax.random.key(0),
    length=NEW,
    prompt_lengths=lengths,
    temperature=0.0,
  )
  np.testing.assert_array_equal(found, wanted[:, T:])


def test_saved_tensors_are_those_that_were_loaded(case, tmp_path):
  name, directory, config, model = case
  interop.save(config, model, tmp_path / 'saved')
  wanted, found = (
    load_file(path / 'model.safetensors')
    for path in (directory, tmp_path / 'saved')
  )
  skipped = interop.FAMILIES[name.partition('-')[0]].skip
  wanted = {
    key: value
    for key, value in wanted.items()
    if not any(fnmatch.fnmatchcase(key, x) for x in skipped)
  }
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_array_equal(found[key], value, strict=True, err_msg=key)
  again = type(theirs(name)).from_pretrained(tmp_path / 'saved')
  assert again.config.to_dict().keys() == theirs(name).config.to_dict().keys()
  wanted = theirs(name).state_dict()
  for key, value in again.state_dict().items():
    assert torch.equal(value, wanted[key]), key


def test_words_are_written_without_a_source(case, tmp_path):
  name, _, config, _ = case
  model_type = name.partition('-')[0]
  family = interop.FAMILIES[model_type]
  words = family.write(config.model) | {'model_type': model_type}
  (tmp_path / 'config.json').write_text(json.dumps(words))
  said = type(theirs(name).config).from_pretrained(tmp_path)
  said.save_pretrained(tmp_path)
  again = json.loads((tmp_path / 'config.json').read_text())
  assert not differences(family.read(again), config.model)
  for key in words.keys() & again:
    if key not in ('rope_parameters', 'n_inner'):  # which have defaults
      assert again[key] == words[key], key
