"""Damaged data is told of in one line."""

import itertools
import json

import datasets
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import files, records

TEXTS = [f'document {i} ' + 'größer ' * (i % 7) for i in range(60)]
GOOD = [json.dumps({'text': text}).encode() for text in TEXTS]
# Lines that are no record with text, and what is said about them.
BAD_LINES = {
  'half_a_character': (b'{"text": "a \\ud800 b"}', 'half a character'),
  'not_utf8': (b'{"text": "\xe9"}', 'is not JSON'),
  'nested': (b'{"text": ' + b'[' * 10**5, 'is not JSON: maximum recursion'),
  'nested_whole': (b'[' * 10**5 + b']' * 10**5, 'is not JSON: maximum recurs'),
  'long_number': (b'{"text": ' + b'1' * 5000 + b'}', 'is not JSON'),
  'number': (b'{"text": 1.5}', "data.text_key='text' holds float, not text"),
  'list': (b'{"text": ["a"]}', "data.text_key='text' holds list, not text"),
  'no_key': (b'{"id": 1}', "data.text_key='text' is not in the records"),
  'no_object': (b'"text"', "data.text_key='text' is not in the records"),
  'zeros': (bytes(20), 'is not JSON'),
  'cut_off': (b'{"text": "a', 'is not JSON'),
  'short': (b'x', 'is not JSON'),
}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hf')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def load(path, batch_size=4, **options):
  config = DataConfig(path=str(path), seq_len=16, **options)
  return data.load(config, batch_size=batch_size)


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_one_line(path, *messages, **options):
  with pytest.raises(ConfigError) as caught:
    load(path, **options)
  line = str(caught.value)
  assert '\n' not in line and all(m in line for m in messages), line


def write_lines(path, lines):
  path.write_bytes(b'\n'.join(lines) + b'\n')
  return path


@pytest.mark.parametrize('name', BAD_LINES)
@pytest.mark.parametrize('where', [0, 60])
def test_the_ends_of_json_lines_are_read_at_opening(name, where, tmp_path):
  line, message = BAD_LINES[name]
  lines = GOOD[:where] + [line] + GOOD[where:]
  path = write_lines(tmp_path / 'a.jsonl', lines)
  byte = len(b'\n'.join([*lines[:where], b'']))
  assert_one_line(path, message, str(path), f'byte {byte}')


def test_white_space_is_no_record(tmp_path):
  lines = GOOD[:40]
  first = load(write_lines(tmp_path / 'a.jsonl', lines))
  blank = [b'', b'   ', b'\t \r', b'\r']
  lines = [*blank, *itertools.chain(*((x, b' ' * 9) for x in lines)), *blank]
  second = load(write_lines(tmp_path / 'b.jsonl', lines))
  jax.tree.map(
    np.testing.assert_array_equal, take(first.train, 9), take(second.train, 9)
  )


def test_lines_longer_than_what_is_read_at_once(tmp_path):
  lines = [b'', b' ' * 70, *GOOD, b'\t' * 33, b'x' * 200, b'']
  path = write_lines(tmp_path / 'a.jsonl', lines)
  file = files.File(str(path), str(path))
  for block in (1, 7, 64, 10**6):
    found = records._lines(3, file, block)
    assert (found[:, 0] == 3).all()
    texts = [files.read(file, *span).strip() for span in found[:, 1:].tolist()]
    assert texts == [*GOOD, b'x' * 200]
  path.write_bytes(b'\n '.join(GOOD[:3]))
  assert [len(records._lines(0, file, block)) for block in (1, 50, 99)] == [
    3
  ] * 3


def _refuse(path, *args, **kwargs):
  raise PermissionError(13, 'Permission denied', path)


def _save(path, table, **options):
  pa.parquet.write_table(pa.table(table), path, **options)


def test_damaged_parquet(tmp_path):
  good, bad = tmp_path / 'a.parquet', tmp_path / 'b.parquet'
  both = tmp_path / '*.parquet'
  _save(good, {'text': TEXTS})
  whole = good.read_bytes()
  for content in (b'', whole[:-20], whole[: len(whole) // 2], b'PAR1' * 9):
    bad.write_bytes(content)
    assert_one_line(both, repr(str(bad)), 'not a Parquet file, or damaged')
  for table, message in [
    ({'id': [1]}, "data.text_key='text' is not in the records; valid: id"),
    ({'text': [1]}, "data.text_key='text' holds int64, not text"),
    ({'text': [b'a']}, "data.text_key='text' holds binary, not text"),
    ({'text': [['a']]}, 'holds list<'),
    ({}, "data.text_key='text' is not in the records"),
  ]:
    _save(bad, table)
    assert_one_line(both, repr(str(bad)), message)
  noise = [np.random.default_rng(i).bytes(900).hex() for i in range(300)]
  _save(bad, {'text': noise}, row_group_size=100, use_dictionary=False)
  content = bytearray(bad.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 10_000] = b'\xff' * 10_000
  bad.write_bytes(content)
  assert_one_line(both, repr(str(bad)), 'row group 1 cannot be read')


def test_parquet_of_other_strings_and_without_rows(tmp_path):
  _save(tmp_path / 'a.parquet', {'text': pa.array(TEXTS[:9])})
  _save(tmp_path / 'b.parquet', {'text': pa.array([], pa.string())})
  _save(
    tmp_path / 'c.parquet', {'text': pa.array(TEXTS[9:], pa.large_string())}
  )
  loaded = load(tmp_path / '*.parquet', valid_path=str(tmp_path / 'a.parquet'))
  assert loaded.valid_bytes().decode() == ''.join(TEXTS[:9])
  assert take(loaded.train, 3)
  assert_one_line(tmp_path / 'b.parquet', 'has no text')


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.parquet'])
def test_files_that_cannot_be_read(name, tmp_path, monkeypatch):
  path = tmp_path / name
  path.symlink_to(tmp_path / 'nothing')
  for pattern in (path, tmp_path / 'a.*'):
    assert_one_line(pattern, repr(str(path)), 'is a link to no file')
  path.unlink()
  path.mkdir()
  assert_one_line(path, 'a folder: add')
  path.rmdir()
  path.write_bytes(b'text')
  monkeypatch.setattr('builtins.open', _refuse)
  assert_one_line(path, repr(str(path)), 'cannot be read: Permission denied')
