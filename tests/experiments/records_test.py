"""Damage to results.jsonl costs the records in which it is, and no other."""

import pytest

from efficient_attn.config import ConfigError
from experiments.ablations import records
from experiments.folder import only_writer

RECORDS = [
  {'key': f'{i:016x}', 'runs': [{'loss': 0.1 * i, 'key': 'x'}], 'name': 'é{"'}
  for i in range(4)
]


@pytest.fixture
def file(tmp_path):
  for record in RECORDS:
    records.append(tmp_path, record)
  return tmp_path / records.FILE


def test_records_are_lines(file):
  assert len(file.read_text().splitlines()) == len(RECORDS)
  assert list(records.read(file.parent).values()) == RECORDS


def test_any_damaged_byte_costs_its_record(file):
  content = file.read_bytes()
  sizes = [len(line) for line in content.splitlines(keepends=True)]
  ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
  for at in range(len(content)):
    for value in (content[at] ^ 1, content[at] ^ 64, 0, ord('\n')):
      if value == content[at]:
        continue
      file.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
      found = records.read(file.parent)
      hit = next(i for i, end in enumerate(ends) if at < end)
      others = [r for i, r in enumerate(RECORDS) if i != hit]
      kept = list(found.values())
      assert [r for r in kept if r['key'] != RECORDS[hit]['key']] == others
      # A record is lost, or it was white space.
      assert len(kept) == 3 or kept == RECORDS


@pytest.mark.parametrize(
  'line', ['{}', '[]', 'null', '{"key": 3}', '{"key": "a"}', '\0\0', '', '{']
)
def test_lines_that_are_no_records(line, file):
  content = file.read_text().splitlines()
  content.insert(2, line)
  file.write_text('\n'.join(content))  # no newline at the end either
  assert list(records.read(file.parent).values()) == RECORDS
  new = {'key': 'new'}
  records.append(file.parent, new)
  assert list(records.read(file.parent).values()) == [*RECORDS, new]


def test_half_a_record_does_not_take_the_next_with_it(file):
  content = file.read_bytes()
  last = len(content.splitlines(keepends=True)[-1])
  for cut in range(1, last):
    file.write_bytes(content[:-cut])
    records.append(file.parent, {'key': 'new'})
    found = list(records.read(file.parent).values())
    assert found[:3] == RECORDS[:3] and found[-1] == {'key': 'new'}


def test_a_folder_has_one_writer(tmp_path):
  out = tmp_path / 'a' / 'b'
  with only_writer(out):
    with pytest.raises(ConfigError, match='another process writes there'):
      with only_writer(out):
        pass
  with only_writer(out):
    pass
  file = tmp_path / 'file'
  file.write_text('')
  with pytest.raises(ConfigError, match='give a folder that can be written'):
    with only_writer(file):
      pass
