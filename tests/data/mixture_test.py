"""Sources are mixed as their weights say, in tokens, in every batch."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig

SHARES = {'a': 0.5, 'b': 0.3, 'c': 0.2}


@pytest.fixture
def sources(tmp_path):
  """Each has a letter of its own, and documents of another length."""
  for name, length in (('a', 40), ('b', 10), ('c', 90)):
    lines = [json.dumps({'text': name * (length + i % 9)}) for i in range(60)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  return {
    name: {'path': str(tmp_path / f'{name}.jsonl'), 'weight': 10 * share}
    for name, share in SHARES.items()
  }


def _load(mixture, batch_size=10, seed=0, **options):
  config = DataConfig(mixture=mixture, seq_len=16, valid_every=6, **options)
  return data.load(config, batch_size=batch_size, seed=seed)


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _sources(rows):
  """Returns the letter of each row [..., T]."""
  letters = rows.max(-1)
  assert ((rows == letters[..., None]) | (rows == 0)).all()
  return letters


@pytest.mark.parametrize('batch_size', [1, 7, 10])
def test_weights_are_shares_of_tokens(sources, batch_size):
  loaded = _load(sources, batch_size)
  batches = _take(loaded.train, 200)
  letters = _sources(np.stack([b['tokens'][:, 1:] for b in batches]))
  for name, share in SHARES.items():
    of_source = letters == ord(name)
    assert abs(of_source.sum() - share * letters.size) < 1 + 2 * batch_size
    # Of every batch, and of every row over time.
    of_batch = of_source.sum(1)
    assert (abs(of_batch - share * batch_size) < 1).all()
    of_row = of_source.sum(0)
    assert (abs(of_row - share * 200) < 4).all()


def test_readings_say_how_often_a_source_is_read(sources):
  loaded = _load(sources, batch_size=5)
  readings = {r.source: r for r in loaded.readings(1)}
  assert {name: round(r.share, 9) for name, r in readings.items()} == SHARES
  for name, reading in readings.items():
    lines = pathlib.Path(sources[name]['path']).read_text().splitlines()
    texts = [json.loads(line)['text'] for line in lines]
    held = data.batches.held_out(60, 6)
    left = [t for t, out in zip(texts, held, strict=True) if not out]
    tokens = sum(map(len, left)) + len(left)
    epochs = SHARES[name] * 5 * 16 / tokens
    np.testing.assert_allclose(reading.epochs, epochs)
    # Two epochs have two of each document.
    batches = _take(loaded.train, int(2 / epochs))
    rows = np.stack([b['tokens'][:, 1:] for b in batches]).reshape(-1, 16)
    count = (rows == ord(name)).sum()
    assert abs(count / sum(map(len, left)) - 2) < 0.1
  assert str(readings['a']).startswith('a: 0.50 of tokens, ')


@pytest.mark.parametrize('packing', ['concat', 'segments'])
@pytest.mark.parametrize('corruption', ['', 'mask'])
def test_order_and_state_are_exact(sources, packing, corruption):
  def load(seed=1):
    return _load(sources, 4, seed, packing=packing, corruption=corruption).train

  batches = iter(load())
  _take(batches, 7)
  state = json.loads(json.dumps(batches.get_state()))
  expected = _take(batches, 9)
  fresh = iter(load())
  _take(fresh, 2)
  fresh.set_state(state)
  for ours, theirs in zip(_take(fresh, 9), expected, strict=True):
    for name in ours:
      np.testing.assert_array_equal(ours[name], theirs[name])
  other = _take(load(2), 16)[7:]
  assert any(
    (a['tokens'] != b['tokens']).any()
    for a, b in zip(expected, other, strict=True)
  )


def test_validation_is_of_all_sources_and_of_each(sources):
  loaded = _load(sources, batch_size=3)
  whole = np.concatenate([b['tokens'][:, 1:].ravel() for b in loaded.valid])
  counts = {ord(name): (whole == ord(name)).sum() for name in SHARES}
  assert list(loaded.valid_parts) == list(SHARES)
  for name, part in loaded.valid_parts.items():
    tokens = np.concatenate([b['tokens'][:, 1:].ravel() for b in part])
    assert set(tokens) == {0, ord(name)}
    assert (tokens == ord(name)).sum() == counts[ord(name)]
  assert sum(counts.values()) == len(loaded.valid_bytes())


def test_a_source_of_weight_0_only_validates(sources):
  sources['b']['weight'] = 0
  loaded = _load(sources)
  letters = {
    int(_sources(r)) for b in _take(loaded.train, 20) for r in b['tokens']
  }
  assert letters == {ord('a'), ord('c')}
  assert 'b' in loaded.valid_parts
  assert [r.epochs for r in loaded.readings(9) if r.source == 'b'] == [0]


def test_weights_of_any_size(sources):
  for name, share in SHARES.items():
    sources[name]['weight'] = 1.7e308 * (2 * share)
  shares = {r.source: round(r.share, 9) for r in _load(sources).readings(1)}
  assert shares == SHARES


def test_one_source_is_as_without_a_mixture(sources):
  path = sources['a']['path']
  mixed = _load({'a': {'path': path}}, 4).train
  config = DataConfig(path=path, seq_len=16, valid_every=6)
  alone = data.load(config, batch_size=4)
  for ours, theirs in zip(_take(mixed, 9), _take(alone.train, 9), strict=True):
    np.testing.assert_array_equal(ours['tokens'], theirs['tokens'])
  assert alone.valid_parts == {}
  (reading,) = alone.readings(100)
  assert reading.source == path and reading.share == 1 and reading.epochs > 1


def test_options_are_keys_of_the_command_line(sources):
  values = {'model': {}, 'data': {'mixture': sources}}
  changes = {'data.mixture.a.weight': '0.25', 'data.mixture.b.text_key': 'text'}
  config = configs.resolve(configs.override(values, changes)).data
  completed = data.complete(config).mixture
  assert completed['a']['weight'] == 0.25 and completed['a']['valid_path'] == ''
  assert configs.as_dict(config) is not None
  assert json.loads(json.dumps(completed)) == completed


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'a.weight': -1}, 'data.mixture.a.weight=-1.0 must be >= 0'),
    ({'a.weight': 'x'}, "data.mixture.a.weight='x' is a str"),
    ({'cc.weight': 1}, "data.mixture.cc.path='' names no text; did you mean"),
    ({'a.wieght': 1}, 'data.mixture.a.wieght=1 is not a known key; did you'),
    ({'a': 3}, 'data.mixture.a=3 must be a group of keys'),
    (
      {'a.weight': 0, 'b.weight': 0, 'c.weight': 0},
      'the weights of a, b, c are all 0',
    ),
    ({'a.path': '/no/such/*.jsonl'}, "data.mixture.a.path='/no/such/*.jsonl'"),
    ({'a.text_key': 'txt'}, "data.text_key='txt' is not in the records"),
  ],
)
def test_mistakes_are_one_line(sources, changes, message):
  sources = configs.override(sources, changes)
  with pytest.raises(ConfigError) as caught:
    _load(sources)
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_a_mixture_has_no_other_path(sources):
  with pytest.raises(ConfigError, match="data.path='x' is not read beside"):
    _load(sources, path='x')
