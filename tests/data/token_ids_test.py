"""Records may hold token ids in place of text."""

import itertools
import json

import datasets
import numpy as np
import pytest
import tokenizers

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig

TEXTS = [f'word {i} ' * (i % 7) for i in range(60)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hf')


@pytest.fixture
def tokenizer(tmp_path):
  vocab = {
    word: i for i, word in enumerate(['[SEP]', 'word', *map(str, range(60))])
  }
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, 'word'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(tmp_path / 'tokenizer.json'))
  return str(tmp_path / 'tokenizer.json')


def _jsonl(path, values):
  path.write_text('\n'.join(json.dumps({'text': v}) for v in values))
  return str(path)


def _parquet(path, values):
  datasets.Dataset.from_dict({'text': values}).to_parquet(path)
  return str(path)


WRITERS = {'jsonl': _jsonl, 'parquet': _parquet}


@pytest.mark.parametrize('packing', ['concat', 'segments'])
@pytest.mark.parametrize('kind', WRITERS)
def test_ids_are_read_as_the_text_is(kind, packing, tokenizer, tmp_path):
  encode = data.load_tokenizer(tokenizer).encode
  write = WRITERS[kind]
  ids = [encode(text).tolist() for text in TEXTS]
  text = write(tmp_path / f'text.{kind}', TEXTS)
  tokens = write(tmp_path / f'ids.{kind}', ids)
  theirs, ours = (
    data.load(
      DataConfig(path=path, tokenizer=tokenizer, seq_len=16, packing=packing),
      batch_size=4,
    )
    for path in (text, tokens)
  )
  assert 'bytes' in theirs.example and 'bytes' not in ours.example
  assert ours.valid_bytes is None and theirs.valid_bytes()
  for split in ('train', 'valid'):
    pairs = zip(
      itertools.islice(getattr(ours, split), 30),
      itertools.islice(getattr(theirs, split), 30),
      strict=True,
    )
    for a, b in pairs:
      assert a.keys() == b.keys() - {'bytes'}
      for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_bytes_as_ids(tmp_path):
  path = _jsonl(tmp_path / 'a.jsonl', [[*t.encode()] for t in TEXTS])
  loaded = data.load(DataConfig(path=path, seq_len=16), batch_size=4)
  assert loaded.tokenizer.token_bytes is not None
  assert next(iter(loaded.train))['tokens'].max() < 128


@pytest.mark.parametrize(
  'bad, message',
  [
    ([1, 256], 'the token 256, beyond the 256 of data.tokenizer='),
    ([-1], 'the token -1, beyond the 256'),
    ([1, 2**70], "data.text_key='text' holds list, not text or token ids"),
    ([1.5], "data.text_key='text' holds list, not text or token ids"),
    ([True], "data.text_key='text' holds list, not text or token ids"),
    ([[1]], "data.text_key='text' holds list, not text or token ids"),
    ([1, [2]], "data.text_key='text' holds list, not text or token ids"),
    ('text', "data.text_key='text' holds str, not token ids, as the first"),
  ],
)
def test_what_is_no_token(bad, message, tmp_path, caplog):
  good = [[1, 2, 3]] * 60
  with pytest.raises(ConfigError) as caught:
    path = _jsonl(tmp_path / 'a.jsonl', [*good, bad])
    data.load(DataConfig(path=path), batch_size=2)
  assert message in str(caught.value) and '\n' not in str(caught.value)
  # In the middle it is an empty document.
  path = _jsonl(tmp_path / 'a.jsonl', [*good[:20], bad, *good])
  loaded = data.load(DataConfig(path=path, seq_len=8), batch_size=2)
  for batch in itertools.islice(loaded.train, 40):
    assert set(np.unique(batch['tokens'])) <= {0, 1, 2, 3}
  assert message in caplog.text


def test_columns_of_other_lists(tmp_path):
  path = _parquet(tmp_path / 'a.parquet', [[1.5], [2.5]])
  with pytest.raises(ConfigError, match='holds list<.*double>, not text'):
    data.load(DataConfig(path=path), batch_size=2)
