"""Random access to documents of text: `len(source)`, `source[i]` -> parts.

In JSON lines, Parquet, ArrayRecord and Hugging Face datasets record i is a
document. Files are long, so record i of them is the i-th piece of their
concatenation: shuffling the records then mixes pieces of all files, and nothing
is read before it is needed.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from efficient_attn.config import ConfigError, nearest
from efficient_attn.data import optional

CONTINUATION = bytes(range(0x80, 0xC0))  # bytes that do not start a character


class Part(NamedTuple):
  """A document, or a piece of one."""

  text: str | bytes
  begins: bool = True  # at the beginning of the document
  ends: bool = True
  before: bytes = b''  # up to four bytes of the document before this piece


class Span(NamedTuple):
  """The document that is bytes [start, stop) of a file."""

  path: str
  start: int
  stop: int


class Source(Protocol):
  """What the text pipeline reads."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> list[Part]: ...


@dataclasses.dataclass(frozen=True)
class Layout:
  """How files are cut into pieces.

  Attributes:
    piece: Bytes of a piece, the end of each document counting as one.
    marks: 1, or 2 if the beginning of a document also counts as one.
    lines: Whether to move a cut to the next line, or character if lines are
      long, so that no token straddles it.
  """

  piece: int
  marks: int
  lines: bool


class Files:
  """Pieces of the concatenation of `spans`."""

  def __init__(self, spans: Sequence[Span], layout: Layout):
    self._spans, self._layout = spans, layout
    sizes = [span.stop - span.start + layout.marks for span in spans]
    self._ends = np.cumsum(sizes)

  def __len__(self):
    return -(-int(self._ends[-1]) // self._layout.piece)

  def __getitem__(self, index) -> list[Part]:
    start = index * self._layout.piece
    stop = min(start + self._layout.piece, int(self._ends[-1]))
    first, last = np.searchsorted(self._ends, (start, stop - 1), 'right')
    parts = []
    for document in range(first, last + 1):
      end = int(self._ends[document])
      size = self._size(document)
      origin = end - size
      parts.append(
        self._part(document, max(start - origin, 0), min(stop - origin, size))
      )
    return parts

  def _size(self, document):
    span = self._spans[document]
    return span.stop - span.start + self._layout.marks

  def _part(self, document, start, stop):
    """Returns [start, stop) of a document, counted with its marks."""
    span = self._spans[document]
    begins, ends = start == 0, stop == self._size(document)
    lead = self._layout.marks - 1
    start, stop = (
      self._cut(
        span, min(max(span.start + offset - lead, span.start), span.stop)
      )
      for offset in (start, stop)
    )
    known = max(start - 4, span.start)
    data = _read(span.path, known, stop)
    return Part(data[start - known :], begins, ends, data[: start - known])

  def _cut(self, span, offset):
    if not self._layout.lines or offset in (span.start, span.stop):
      return offset
    return next_line(span, offset, self._layout.piece)


def _read(path, start, stop):
  with open(path, 'rb', buffering=0) as file:
    file.seek(start)
    return file.read(stop - start)


def next_line(span: Span, offset: int, limit: int) -> int:
  """Returns where the first line after `offset` starts, or a character."""
  window = _read(span.path, offset, min(offset + limit, span.stop))
  line = window.find(b'\n') + 1
  return offset + (line or len(window) - len(window.lstrip(CONTINUATION)))


class JsonLines:
  """Lines of JSON with the text under `key`; only their offsets are held."""

  def __init__(self, config_key: str, paths: Sequence[str], text_key: str):
    self._paths, self._key = paths, text_key
    self._config_key = config_key
    self._index = np.concatenate([_lines(i, p) for i, p in enumerate(paths)])

  def __len__(self):
    return len(self._index)

  def __getitem__(self, index) -> list[Part]:
    number, start, stop = self._index[index].tolist()
    line = _read(self._paths[number], start, stop)
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ConfigError(
        f'{self._config_key}: the line at byte {start} of '
        f'{self._paths[number]!r} is not JSON: {error}'
      ) from error
    return [Part(_field(record, self._key))]


def _lines(number, path, block=2**24):
  """Returns [lines, 3]: file number, first byte, last byte + 1."""
  breaks, size = [], os.path.getsize(path)
  for start in range(0, size, block):
    data = np.frombuffer(_read(path, start, start + block), np.uint8)
    breaks.append(np.flatnonzero(data == ord('\n')) + start + 1)
  stops = np.concatenate([*breaks, [size]]).astype(np.int64)
  starts = np.concatenate([[0], stops[:-1]])
  lines = np.stack([np.full_like(stops, number), starts, stops], axis=1)
  return lines[stops - starts > 2]  # nothing shorter holds a key


class ArrayRecords:
  """Records that are text or, if the first one is, JSON objects."""

  def __init__(self, config_key: str, paths: Sequence[str], text_key: str):
    optional.require('array_record', config_key, paths[0])
    self._records = grain.sources.ArrayRecordDataSource(paths)
    self._key = text_key
    try:
      self._json = isinstance(json.loads(self._records[0]), dict)
    except ValueError:
      self._json = False

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index) -> list[Part]:
    record = self._records[index]
    return [
      Part(_field(json.loads(record), self._key) if self._json else record)
    ]


class Table:
  """A memory-mapped `datasets.Dataset`."""

  def __init__(self, dataset, text_key: str):
    _field(dict.fromkeys(dataset.column_names), text_key)
    self._dataset = dataset.select_columns([text_key])
    self._key = text_key

  def __len__(self):
    return len(self._dataset)

  def __getitem__(self, index) -> list[Part]:
    return [Part(_field(self._dataset[int(index)], self._key))]


def _parquet(config_key, paths, text_key):
  datasets = optional.require('datasets', config_key, paths[0])
  parquet = optional.require('pyarrow.parquet', config_key, paths[0])
  _field(dict.fromkeys(parquet.read_schema(paths[0]).names), text_key)
  dataset = datasets.Dataset.from_parquet(paths, columns=[text_key])
  return Table(dataset, text_key)


def _field(record, key):
  """Returns the text of a record; none, or null, is an empty document."""
  if not isinstance(record, dict) or key not in record:
    keys = record if isinstance(record, dict) else ('no keys at all',)
    raise ConfigError(
      f'data.text_key={key!r} is not in the records; {nearest(key, keys)}'
    )
  text = '' if record[key] is None else record[key]
  if not isinstance(text, str):
    raise ConfigError(
      f'data.text_key={key!r} holds {type(text).__name__}, not text; '
      f'the keys are {", ".join(record)}'
    )
  return text


# Sources of whole documents; '.txt' and the standard library are `Files`.
RECORDS = {
  '.jsonl': JsonLines,
  '.parquet': _parquet,
  '.array_record': ArrayRecords,
}


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The records of a source with the given numbers."""

  source: Source
  numbers: np.ndarray

  def __len__(self):
    return len(self.numbers)

  def __getitem__(self, index) -> list[Part]:
    return self.source[int(self.numbers[index])]
