"""Damaged data: one line at opening, skipped later, and at last an error."""

import gzip
import itertools
import json
import logging
import os

import array_record.python.array_record_module as array_record
import datasets
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import files, records
from efficient_attn.data.damage import allowed

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


@pytest.mark.parametrize('name', BAD_LINES)
def test_a_damaged_line_is_an_empty_document(name, tmp_path, caplog):
  path = tmp_path / 'a.jsonl'
  lines = GOOD.copy()
  lines[20] = b'{"text": ""}'
  expected = take(load(write_lines(path, lines)).train, 80)  # epochs
  lines[20] = BAD_LINES[name][0]
  loaded = load(write_lines(path, lines))
  batches = iter(loaded.train)
  before = take(batches, 5)
  state = json.loads(json.dumps(batches.get_state()))
  jax.tree.map(
    np.testing.assert_array_equal, before + take(batches, 75), expected
  )
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  message = record.getMessage()
  assert BAD_LINES[name][1] in message and str(path) in message
  assert '1 so far' in message and '\n' not in message
  fresh = iter(load(path).train)
  fresh.set_state(state)
  jax.tree.map(np.testing.assert_array_equal, take(fresh, 9), expected[5:14])


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


def test_how_many_may_be_damaged():
  found = [allowed(n) for n in (0, 1, 2, 7, 100, 1000, 5000, 10**6)]
  assert found == [0, 0, 1, 3, 10, 10, 50, 10**4]


def broken_middle(path):
  """Writes lines of which those in the middle are damaged."""
  lines = GOOD.copy()
  lines[20:40] = [b'{'] * 20
  return write_lines(path, lines)


def test_too_many_end_the_run_at_a_state_to_save(tmp_path, caplog):
  path = broken_middle(tmp_path / 'a.jsonl')
  batches = iter(load(path, batch_size=8).train)
  done = []
  with pytest.raises(data.BadDataError, match='damaged record 11 of .* 10 may'):
    for batch in batches:
      state = batches.get_state()
      done.append(batch)
  assert len(done) > 1 and len(caplog.records) == 10
  assert batches.get_state() == state
  # Repaired by emptying them, the run goes on as if it had not stopped.
  text = path.read_bytes().replace(b'{\n', b'{"text": ""}\n')
  path.write_bytes(text)
  whole = take(load(path, batch_size=8).train, len(done) + 9)
  jax.tree.map(np.testing.assert_array_equal, done, whole[: len(done)])
  fresh = iter(load(path, batch_size=8).train)
  fresh.set_state(json.loads(json.dumps(state)))
  jax.tree.map(np.testing.assert_array_equal, take(fresh, 9), whole[-9:])


@pytest.mark.parametrize('damage', ['deleted', 'cut', 'unreadable'])
@pytest.mark.parametrize('name', ['{}.txt', '{}.jsonl'])
def test_files_that_vanish_end_the_run(name, damage, tmp_path, monkeypatch):
  for i in range(8):
    lines = [json.dumps({'text': 'text ' * 50 + str(j)}) for j in range(60)]
    (tmp_path / name.format(i)).write_text('\n'.join(lines))
  batches = iter(load(tmp_path / name.format('*'), batch_size=4).train)
  take(batches, 3)
  for file in tmp_path.glob(name.format('*')):
    if damage == 'deleted':
      file.unlink()
    elif damage == 'cut':
      os.truncate(file, 10)
  if damage == 'unreadable':
    monkeypatch.setattr('builtins.open', _refuse)
  with pytest.raises(data.BadDataError) as caught:
    for _ in batches:
      state = batches.get_state()
  assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)
  assert batches.get_state() == state
  with pytest.raises(data.BadDataError):
    next(batches)
  assert batches.get_state() == state


def _refuse(path, *args, **kwargs):
  raise PermissionError(13, 'Permission denied', path)


def test_workers_report_what_is_damaged(tmp_path, capfd):
  path = broken_middle(tmp_path / 'a.jsonl')
  batches = iter(load(path, batch_size=8, workers=1).train)
  try:
    with pytest.raises(data.BadDataError, match='damaged record 11 of'):
      for _ in batches:
        state = batches.get_state()
    assert batches.get_state() == state
  finally:
    batches.close()
  printed = capfd.readouterr().err
  assert 'skipped a damaged record, 1 so far' in printed
  assert str(path) in printed and 'Traceback' not in printed


@pytest.mark.parametrize('text', ['', None])
def test_data_without_text_does_not_hang(text, tmp_path):
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, 'a'))
  words.save(str(tmp_path / 'tokenizer.json'))
  lines = [json.dumps({'text': text}).encode()] * 12
  path = write_lines(tmp_path / 'a.jsonl', lines)
  loaded = load(path, tokenizer=str(tmp_path / 'tokenizer.json'))
  with pytest.raises(data.BadDataError, match='records of data.path had no'):
    next(iter(loaded.train))


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


def test_parquet_whose_strings_are_not_utf8(tmp_path, caplog):
  texts = [text.encode() for text in TEXTS]
  texts[30] = b'\xff\xfe'
  column = pa.array(texts, pa.binary()).view(pa.string())
  _save(tmp_path / 'a.parquet', {'text': column})
  loaded = load(tmp_path / 'a.parquet', valid_path=str(tmp_path / 'a.parquet'))
  assert loaded.valid_bytes() == b''.join(t for t in texts if t[0] != 255)
  (record,) = caplog.records
  assert f"row 30 of '{tmp_path / 'a.parquet'}'" in record.getMessage()


def _array_record(path, records):
  writer = array_record.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()
  return path


def test_damaged_array_records(tmp_path, caplog):
  path = _array_record(tmp_path / 'a.array_record', GOOD)
  whole = path.read_bytes()
  bad = tmp_path / 'b.array_record'
  for content in (b'', whole[:-100], whole[: len(whole) // 2], whole[:999]):
    bad.write_bytes(content)
    assert_one_line(tmp_path / '*.array_record', repr(str(bad)), 'or damaged')
  bad.unlink()
  for lines, message in [
    ([*GOOD, b'{'], "record 60 of '.*' is not JSON"),
    ([b'\xff', *GOOD], "record 0 of '.*' is not UTF-8"),
  ]:
    _array_record(bad, lines)
    with pytest.raises(ConfigError, match=message):
      load(bad)
  _array_record(bad, GOOD[:20] + [b'{', b'[' * 10**5] + GOOD[20:])
  take(load(bad, valid_path=str(path)).train, 80)
  assert len(caplog.records) == 2
  # One chunk whose checksum is wrong.
  content = bytearray(whole)
  content[1500:1504] = b'abcd'
  bad.write_bytes(content)
  take(load(bad, valid_path=str(path)).train, 80)
  assert len(caplog.records) == 3
  assert repr(str(bad)) in caplog.records[2].getMessage()
  _array_record(bad, [])
  assert_one_line(bad, 'has no text')


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.txt.gz', 'a.parquet'])
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


def test_subwords_need_utf8(tmp_path, caplog):
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, 'a'))
  words.save(str(tmp_path / 'tokenizer.json'))
  words = str(tmp_path / 'tokenizer.json')
  latin = 'größer\n'.encode('latin-1')
  path = tmp_path / 'a.txt'
  path.write_bytes(b'text\n' * 9 + latin * 999)
  assert_one_line(path, repr(str(path)), 'byte 47 is not', tokenizer=words)
  take(load(path).train, 3)  # as bytes
  path.write_bytes(b'text\n' * 2000 + latin + b'text\n' * 2000)
  take(load(path, tokenizer=words).train, 2)
  (record,) = caplog.records
  assert 'byte 10002 is not UTF-8' in record.getMessage()


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
@pytest.mark.parametrize('kind', ['.txt', '.jsonl'])
def test_compressed_files_are_read_like_others(kind, suffix, tmp_path):
  contents = [b'\n'.join(GOOD[i * 12 : i * 12 + 12]) for i in range(5)]
  for i, content in enumerate(contents):
    (tmp_path / f'{i}{kind}').write_bytes(content)
    _compress(tmp_path / f'{i}{kind}{suffix}', content)
  plain = load(tmp_path / f'[1-4]{kind}', valid_path=str(tmp_path / f'0{kind}'))
  both = tmp_path / f'[1-4]{kind}{suffix}'
  valid_path = str(tmp_path / f'0{kind}{suffix}')
  for _ in range(2):
    packed = load(both, valid_path=valid_path)
    for ours, theirs in (
      (plain.train, packed.train),
      (plain.valid, packed.valid),
    ):
      jax.tree.map(
        np.testing.assert_array_equal, take(ours, 30), take(theirs, 30)
      )
    copies = list((tmp_path / 'cache').rglob('*'))
    assert sum(file.is_file() for file in copies) == 5
  path = tmp_path / f'1{kind}{suffix}'
  for content in (
    b'',
    path.read_bytes()[:-9],
    b'text',
    path.read_bytes() + b'x',
  ):
    path.write_bytes(content)
    assert_one_line(both, repr(str(path)), 'cannot be decompressed')
  assert sum(file.is_file() for file in (tmp_path / 'cache').rglob('*')) == 5


def _compress(path, content):
  if path.suffix == '.gz':
    path.write_bytes(gzip.compress(content))
  else:
    half = len(content) // 2  # two frames, as tools write that work in parallel
    with open(path, 'wb') as file:
      for part in (content[:half], content[half:]):
        file.write(pa.compress(part, 'zstd', asbytes=True))


def test_compressed_files_of_one_kind(tmp_path):
  for name in ('a.jsonl', 'a.jsonl.gz', 'b.parquet.gz', 'c.gz', 'd.json.gz'):
    (tmp_path / name).write_bytes(gzip.compress(GOOD[0]))
  assert_one_line(tmp_path / 'a*', "['.jsonl', '.jsonl.gz']", 'one kind')
  for name in ('b.parquet.gz', 'c.gz'):
    assert_one_line(tmp_path / name, 'cannot read')
  assert_one_line(tmp_path / 'd.json.gz', "did you mean '.jsonl.gz'?")
