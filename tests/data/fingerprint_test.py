"""A fingerprint changes when the data does, and only then."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest
import tokenizers

from efficient_attn import data
from efficient_attn.config import DataConfig

LINES = [json.dumps({'text': f'text {i}'}) + '\n' for i in range(500)]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hf')


def fingerprint(**options):
  config = DataConfig(seq_len=16, **options)
  return data.load(config, batch_size=4).fingerprint


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / 'corpus'
  folder.mkdir()
  for i in range(5):
    (folder / f'{i}.txt').write_text(''.join(LINES[i * 100 : i * 100 + 100]))
  return folder


def _append(file):
  with open(file, 'a') as stream:
    stream.write(LINES[0])


def _zero(file, start=0):
  content = file.read_bytes()
  with open(file, 'r+b') as stream:
    stream.seek(start)
    stream.write(bytes(1) * (len(content) - start))


CHANGES = {
  'deleted': lambda file: file.unlink(),
  'renamed': lambda file: file.rename(file.with_stem('other')),
  'longer': _append,
  'cut': lambda file: os.truncate(file, file.stat().st_size - 20),
  'zeroed': _zero,
  'tail_zeroed': lambda file: _zero(file, 1000),
  'edited': lambda file: file.write_text(
    file.read_text().replace('text 210', 'text 012')
  ),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_files_are_noticed(change, corpus):
  path = str(corpus / '*.txt')
  before = fingerprint(path=path)
  CHANGES[change](corpus / '2.txt')
  assert fingerprint(path=path) != before


def test_copies_are_the_same(corpus, tmp_path):
  before = fingerprint(path=str(corpus / '*.txt'))
  copy = shutil.copytree(corpus, tmp_path / 'copy')
  for file in copy.iterdir():
    os.utime(file, (0, 0))
  assert fingerprint(path=str(copy / '*.txt')) == before


def test_validation_and_tokenizer_count(corpus, tmp_path):
  path, valid_path = str(corpus / '[0-3].txt'), str(corpus / '4.txt')
  found = [fingerprint(path=path, valid_path=valid_path)]
  _append(corpus / '4.txt')
  found.append(fingerprint(path=path, valid_path=valid_path))
  file = tmp_path / 'tokenizer.json'
  for vocab in ({'a': 0}, {'a': 0, '[SEP]': 1}):
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, 'a')).save(
      str(file)
    )
    found.append(fingerprint(path=path, tokenizer=str(file)))
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": 0}')
  found.append(fingerprint(path=path, tokenizer=str(file)))
  assert len(set(found)) == len(found)


def test_hugging_face_folders(tmp_path):
  folder = tmp_path / 'saved'
  table = datasets.Dataset.from_dict({'text': LINES})
  table.save_to_disk(folder)
  first = fingerprint(path=f'hf:{folder}')
  assert fingerprint(path=f'hf:{folder}') == first
  shutil.rmtree(folder)
  table.select(range(1, 500)).save_to_disk(folder)
  assert fingerprint(path=f'hf:{folder}') != first


def test_tasks(tmp_path):
  drawn = [
    fingerprint(name='induction'),
    fingerprint(name='induction', options={'seq_len': 32}),
    fingerprint(name='induction', valid_options={'seq_len': 32}),
    fingerprint(name='palindrome'),
    fingerprint(name='image_sequence'),
    fingerprint(name='byte_classification'),
    fingerprint(name='digits'),
  ]
  assert len(set(drawn)) == len(drawn)
  assert fingerprint(name='induction') == drawn[0]
  for part in ('train/neg', 'train/pos', 'test/neg', 'test/pos'):
    (tmp_path / part).mkdir(parents=True)
    (tmp_path / part / 'a.txt').write_text(part)
  task = dict(name='byte_classification', options={'path': str(tmp_path)})
  found = [fingerprint(**task)]
  for part in ('train/neg', 'test/pos'):
    (tmp_path / part / 'a.txt').write_text('\0' * len(part))
    found.append(fingerprint(**task))
  assert len(set(found)) == 3


def test_pictures_in_files(tmp_path):
  rng = np.random.default_rng(0)
  for name in [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']:
    records = rng.integers(0, 10, (9, 3073), np.uint8)
    records.tofile(tmp_path / name)
  task = dict(name='image_sequence', options={'path': str(tmp_path)})
  first = fingerprint(**task)
  assert fingerprint(**task) == first
  records[3, 1:] = 0
  records.tofile(tmp_path / 'test_batch.bin')
  assert fingerprint(**task) != first
