"""Every format, the split, and what a user can get wrong about files."""

import json
import os

import array_record.python.array_record_module as array_record
import datasets
import numpy as np
import pytest

from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import batches, documents, sources

LAYOUT = sources.Layout(piece=7, tokens=7, marks=1, lines=False)
TEXTS = [f'Dokument {i}: {"größer " * (i % 5)}\n' for i in range(60)] + ['']


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def _jsonl(folder):
  lines = [json.dumps({'text': text, 'id': 1}) + '\n' for text in TEXTS]
  (folder / 'a.jsonl').write_text(''.join(lines[:50]) + '\n\n')
  (folder / 'b.jsonl').write_text(''.join(lines[50:]).rstrip('\n'))
  return str(folder / '*.jsonl')


def _parquet(folder):
  table = datasets.Dataset.from_dict({'id': range(len(TEXTS)), 'text': TEXTS})
  table.to_parquet(folder / 'a.parquet')
  return str(folder / 'a.parquet')


def _array_record(folder, encode=str.encode):
  path = str(folder / 'a.array_record')
  writer = array_record.ArrayRecordWriter(path, 'group_size:1')
  for text in TEXTS:
    writer.write(encode(text))
  writer.close()
  return path


def _array_record_of_json(folder):
  return _array_record(folder, lambda t: json.dumps({'text': t}).encode())


def _hugging_face(folder):
  table = datasets.Dataset.from_dict({'text': TEXTS[::-1]})
  table = table.select(range(len(TEXTS))[::-1])  # with a mapping of indices
  table.save_to_disk(folder / 'saved')
  return f'hf:{folder / "saved"}'


FORMATS = {
  'jsonl': _jsonl,
  'parquet': _parquet,
  'array_record': _array_record,
  'array_record_of_json': _array_record_of_json,
  'hf': _hugging_face,
}


def _texts(source):
  """Returns the documents of a source, joined again from their pieces."""
  texts = []
  for parts in (source[i] for i in range(len(source))):
    for part in parts:
      text = part.text if isinstance(part.text, bytes) else part.text.encode()
      if part.begins:
        texts.append(b'')
      assert texts[-1].endswith(part.before)
      texts[-1] += text
  return [text.decode() for text in texts]


@pytest.mark.parametrize('name', FORMATS)
def test_every_record_is_in_one_split(name, tmp_path):
  path = FORMATS[name](tmp_path)
  loaded = documents.load(DataConfig(path=path, valid_every=6), LAYOUT)
  train, valid = (_texts(source) for source in loaded[:2])
  assert sorted(train + valid) == sorted(TEXTS)
  held = batches.held_out(len(TEXTS), 6)
  assert valid == [t for t, h in zip(TEXTS, held, strict=True) if h]


@pytest.mark.parametrize('marks', [1, 2])
@pytest.mark.parametrize('lines', [False, True])
@pytest.mark.parametrize('piece', [1, 7, 50, 10_000])
def test_pieces_of_files_join_to_the_documents(tmp_path, piece, lines, marks):
  for i, text in enumerate(TEXTS):
    (tmp_path / f'{i:02}.txt').write_text(text * 3)
  config = DataConfig(path=str(tmp_path / '*.txt'), valid_every=6)
  loaded = documents.load(config, sources.Layout(piece, piece, marks, lines))
  train, valid = (_texts(source) for source in loaded[:2])
  held = [documents.validates(f'{i:02}.txt', 6) for i in range(len(TEXTS))]
  for split, wanted in ((train, False), (valid, True)):
    assert split == [
      t * 3 for t, h in zip(TEXTS, held, strict=True) if t and h == wanted
    ]
  if lines and piece == 50:
    parts = [p for i in range(len(loaded[0])) for p in loaded[0][i]]
    assert all(p.text.endswith(b'\n') for p in parts if p.text)


def test_cuts_in_a_long_line_keep_characters_whole(tmp_path):
  (tmp_path / 'a.txt').write_text('世界' * 500)
  config = DataConfig(path=str(tmp_path / 'a.txt'), valid_every=5)
  for source in documents.load(config, sources.Layout(50, 50, 1, True))[:2]:
    for part in (source[i][0] for i in range(len(source))):
      assert '\ufffd' not in part.text.decode()


def test_a_lone_file_gives_its_last_part(tmp_path):
  (tmp_path / 'a.txt').write_text(''.join(TEXTS))
  config = DataConfig(path=str(tmp_path / 'a.txt'), valid_every=10)
  (train,), (valid,) = map(_texts, documents.load(config, LAYOUT)[:2])
  assert train + valid == ''.join(TEXTS)
  assert train.endswith('\n') and 0.05 < len(valid) / len(train) < 0.15


def test_valid_path_leaves_all_of_path_for_training(tmp_path):
  path = _jsonl(tmp_path)
  (tmp_path / 'v.txt').write_text('valid')
  config = DataConfig(path=path, valid_path=str(tmp_path / 'v.txt'))
  train, valid, *_ = documents.load(config, LAYOUT)
  assert (_texts(train), _texts(valid)) == (TEXTS, ['valid'])


def test_the_splits_of_a_hugging_face_dataset(tmp_path):
  splits = {'train': ['a', 'b'], 'validation': ['c']}
  datasets.DatasetDict(
    {k: datasets.Dataset.from_dict({'text': v}) for k, v in splits.items()}
  ).save_to_disk(tmp_path / 'saved')
  path = f'hf:{tmp_path / "saved"}'
  train, valid, *_ = documents.load(
    DataConfig(path=path, valid_path=path), LAYOUT
  )
  assert (_texts(train), _texts(valid)) == (['a', 'b'], ['c'])


def test_the_split_never_changes():
  names = [f'{i}.txt' for i in range(30)]
  held = [i for i, name in enumerate(names) if documents.validates(name, 4)]
  assert held == [3, 7, 15, 16, 19, 23, 25]
  assert not documents.validates('json/decoder.py', 20)
  assert documents.validates('asyncio/events.py', 20)
  assert np.flatnonzero(batches.held_out(40, 6)).tolist() == [0, 3, 18, 21, 22]
  np.testing.assert_array_equal(
    batches.held_out(1000, 6)[:100], batches.held_out(100, 6)
  )
  assert abs(batches.held_out(100_000, 20).mean() * 20 - 1) < 0.02


def test_the_standard_library_is_split_by_file():
  config = DataConfig()
  layout = sources.Layout(piece=4096, tokens=1, marks=1, lines=False)
  train, valid, *_ = documents.load(config, layout)
  assert 0.02 < len(valid) / len(train) < 0.1
  traceback = os.path.join(os.path.dirname(os.__file__), 'traceback.py')
  assert traceback in [span.file.path for span in valid._source._spans]
  paths = [span.file.path for s in (train, valid) for span in s._source._spans]
  assert len(paths) == len(set(paths)) > 300
  assert not any('/test/' in path or 'site-packages' in path for path in paths)


@pytest.mark.parametrize(
  'name', ['jsonl', 'parquet', 'array_record_of_json', 'hf']
)
def test_a_wrong_text_key_names_the_right_one(name, tmp_path):
  config = DataConfig(path=FORMATS[name](tmp_path), text_key='txt')
  with pytest.raises(ConfigError, match="data.text_key='txt'.*'text'"):
    documents.load(config, LAYOUT)


@pytest.mark.parametrize(
  'path, message',
  [
    ('missing.txt', r"data.path='.*missing.txt': no such file"),
    ('*.jsonl', r'data.path=.*\*.jsonl.*: no such file; give a file, a glob'),
    ('', r'a folder: add /\*.jsonl'),
    ('a.csv', "cannot read '.csv' files"),
    ('a.*', r"matches \['.csv', '.txt'\]; give one kind"),
    ('empty.text', "cannot read '.text' files; did you mean '.txt'"),
    ('b/*.txt', 'has no text; name another file'),
    ('a.txt', 'data.valid_every=20; give data.valid_path'),
  ],
)
def test_mistakes_about_files(path, message, tmp_path):
  for name in ('a.csv', 'a.txt', 'empty.text'):
    (tmp_path / name).write_text('text')
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b/b.txt').write_text('')
  with pytest.raises(ConfigError, match=message):
    documents.load(DataConfig(path=f'{tmp_path}/{path}'), LAYOUT)


def test_mistakes_about_records(tmp_path):
  file = tmp_path / 'a.jsonl'
  for text, message in [
    ('{"text": 1}\n', "data.text_key='text' holds int, not text"),
    ('{"text"\n', 'line at byte 0 of .* is not JSON'),
    ('[1, 2]\n', "data.text_key='text' is not in the records"),
    ('{"text": "one"}\n', 'give data.valid_path'),
  ]:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
      documents.load(DataConfig(path=str(file)), LAYOUT)


def test_datasets_of_the_hub(monkeypatch):
  def load_dataset(*names):
    if names == ('owner/name', 'subset'):
      return {'train': datasets.Dataset.from_dict({'text': TEXTS})}
    raise ConnectionError('offline\nby choice')

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  train, *_ = documents.load(DataConfig(path='hf:owner/name/subset'), LAYOUT)
  assert set(_texts(train)) < set(TEXTS)
  with pytest.raises(ConfigError, match="'hf:a/b' .*(offline).*save_to_disk"):
    documents.load(DataConfig(path='hf:a/b'), LAYOUT)
  both = DataConfig(
    path='hf:owner/name/subset', valid_path='hf:owner/name/subset'
  )
  with pytest.raises(ConfigError, match="no split 'validation'; it has train"):
    documents.load(both, LAYOUT)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
  path = _parquet(tmp_path)
  monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
  with pytest.raises(ConfigError, match=r"pip install 'efficient_attn\[hf\]'"):
    documents.load(DataConfig(path=path), LAYOUT)
