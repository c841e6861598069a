"""The records of a study, `results.jsonl`: one a program, each with a checksum.

Records are found by how they begin, not by lines, and those whose checksum is
wrong do not count: damage costs the records in which it is, and no other.
"""

import json
import os
import pathlib
import zlib
from collections.abc import Mapping

FILE = 'results.jsonl'
BEGIN = '{"key": "'


def read(out: pathlib.Path) -> dict[str, dict]:
  """Returns the whole records by key, the last one of each key."""
  file = out / FILE
  if not file.exists():
    return {}
  text = file.read_text(encoding='utf-8', errors='replace')
  found, decoder = {}, json.JSONDecoder()
  start = text.find(BEGIN)
  while start >= 0:
    try:
      record, _ = decoder.raw_decode(text, start)
    except ValueError:
      record = {}
    if record.pop('crc32', None) == _checksum(record):
      found[record['key']] = record
    start = text.find(BEGIN, start + 1)
  return found


def append(out: pathlib.Path, record: Mapping) -> None:
  """Adds a record, which begins with its `key`, on a line of its own."""
  line = json.dumps(record | {'crc32': _checksum(record)}) + '\n'
  with (out / FILE).open('ab+') as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      if file.read(1) != b'\n':  # a kill left half a line
        line = '\n' + line
    file.write(line.encode())
    file.flush()
    os.fsync(file.fileno())


def _checksum(record: Mapping) -> int:
  return zlib.crc32(json.dumps(record).encode())
