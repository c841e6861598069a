"""Formats of which a record is a document, with the text under a key.

What is damaged is found as early as it is cheap to: files that cannot be read
or are of another kind when they are opened, with the first and the last record
of each; other records when they are read. JSON has to be UTF-8, and lines of
white space do not count.
"""

import itertools
import json
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from efficient_attn.data import files, optional
from efficient_attn.data.damage import BadDataError, line
from efficient_attn.data.files import File
from efficient_attn.data.sources import Part
from efficient_attn.values import nearest

SPACE = b' \t\r\n'  # as JSON has it
WHITE = np.isin(np.arange(256), list(SPACE))
STRINGS = ('string', 'large_string', 'string_view')  # of Arrow


class JsonLines:
  """Lines of JSON; only their offsets are held."""

  def __init__(self, config_key: str, paths: Sequence[File], text_key: str):
    self._files, self._key = paths, text_key
    indices = [_lines(i, file) for i, file in enumerate(paths)]
    self._index = np.concatenate(indices)
    _read_ends(self, map(len, indices))

  def __len__(self):
    return len(self._index)

  def __getitem__(self, index) -> list[Part]:
    number, start, stop = self._index[index].tolist()
    file = self._files[number]
    where = f'the line at byte {start} of {file.name!r}'
    record = _parse(files.read(file, start, stop), where)
    return [Part(_text(record, self._key, where))]


def _lines(number, file, block=2**24):
  """Returns [lines, 3]: file number, first byte, last byte + 1."""
  total, rest = files.size(file), b''
  lines = [np.zeros((0, 3), np.int64)]
  for start in range(0, total, block):
    stop = min(start + block, total)
    data = rest + files.read(file, start, stop)
    origin = start - len(rest)
    bytes_ = np.frombuffer(data, np.uint8)
    stops = np.flatnonzero(bytes_ == ord('\n')) + 1
    if stop == total and not data.endswith(b'\n'):
      stops = np.append(stops, len(data))
    if not len(stops):
      rest = data
      continue
    rest = data[stops[-1] :]
    starts = np.insert(stops[:-1], 0, 0)
    solid = ~WHITE[bytes_[starts]]
    for i in np.flatnonzero(~solid):
      solid[i] = bool(data[starts[i] : stops[i]].strip(SPACE))
    found = np.stack([starts + origin, stops + origin], axis=1)[solid]
    lines.append(np.insert(found, 0, number, axis=1))
  return np.concatenate(lines)


class ArrayRecords:
  """Records that are text or, if the first one is, JSON objects."""

  def __init__(self, config_key: str, paths: Sequence[File], text_key: str):
    optional.require('array_record', config_key, paths[0].name)
    self._files, self._key = paths, text_key
    self._readers = [_array_record(file) for file in paths]
    self._ends = np.cumsum([len(reader) for reader in self._readers])
    self._json = len(self) > 0 and _is_json(self._bytes(0)[0])
    _read_ends(self, map(len, self._readers))

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index) -> list[Part]:
    data, where = self._bytes(index)
    if self._json:
      return [Part(_text(_parse(data, where), self._key, where))]
    try:
      return [Part(data.decode())]
    except UnicodeDecodeError as error:
      raise BadDataError(f'{where} is not UTF-8: {error}') from error

  def _bytes(self, index):
    number, row = _place(self._ends, index)
    where = f'record {row} of {self._files[number].name!r}'
    try:
      return self._readers[number][row], where
    except (OSError, RuntimeError) as error:  # Riegeli raises the latter
      raise BadDataError(f'{where} cannot be read: {line(error)}') from error


def _array_record(file):
  files.size(file)  # readable at all
  try:
    return grain.sources.ArrayRecordDataSource([file.path])
  except (OSError, RuntimeError, ValueError) as error:
    raise BadDataError(
      f'{file.name!r} is not an ArrayRecord file, or damaged: {line(error)}'
    ) from error


def _is_json(data):
  try:
    return isinstance(json.loads(data), dict)
  except (ValueError, RecursionError):
    return False


class Table:
  """A memory-mapped `datasets.Dataset`.

  Args:
    dataset: of which one column is text.
    text_key: the name of that column.
    names: of the dataset, in errors; or of the files that were joined to it.
    ends: how many rows it has up to the end of each file.
  """

  def __init__(
    self,
    dataset,
    text_key: str,
    names: Sequence[str],
    ends: Sequence[int] | None = None,
  ):
    _text(dict.fromkeys(dataset.column_names), text_key, repr(names[0]))
    self._dataset = dataset.select_columns([text_key])
    self._key, self._names = text_key, names
    self._ends = np.array([len(dataset)] if ends is None else ends)
    _read_ends(self, np.diff(self._ends, prepend=0))

  def __len__(self):
    return len(self._dataset)

  def __getitem__(self, index) -> list[Part]:
    number, row = _place(self._ends, index)
    where = f'row {row} of {self._names[number]!r}'
    try:
      record = self._dataset[int(index)]
    except (OSError, ValueError) as error:  # Arrow's, and text's that is none
      raise BadDataError(f'{where} cannot be read: {line(error)}') from error
    return [Part(_text(record, self._key, where))]


def _parquet(config_key, paths, text_key):
  datasets = optional.require('datasets', config_key, paths[0].name)
  parquet = optional.require('pyarrow.parquet', config_key, paths[0].name)
  types = optional.require('pyarrow.types', config_key, paths[0].name)
  rows = [_parquet_rows(parquet, types, file, text_key) for file in paths]
  filled = [file for file, count in zip(paths, rows, strict=True) if count]
  if not filled:
    return ()
  try:
    dataset = datasets.Dataset.from_parquet(
      [file.path for file in filled], columns=[text_key]
    )
  except datasets.exceptions.DatasetsError as error:
    raise _damaged_parquet(parquet, filled, text_key, error) from error
  names = [file.name for file in filled]
  return Table(dataset, text_key, names, np.cumsum([n for n in rows if n]))


def _parquet_rows(parquet, types, file, text_key):
  """Returns the number of rows of a file whose schema is as it should be."""
  try:
    with open(file.path, 'rb') as stream:
      opened = parquet.ParquetFile(stream)
      schema, rows = opened.schema_arrow, opened.metadata.num_rows
  except (OSError, ValueError) as error:
    raise BadDataError(
      f'{file.name!r} is not a Parquet file, or damaged: {line(error)}'
    ) from error
  _text(dict.fromkeys(schema.names), text_key, repr(file.name))
  for index in schema.get_all_field_indices(text_key):
    kind = schema.types[index]
    value = kind.value_type if types.is_dictionary(kind) else kind
    if str(value) not in STRINGS:
      raise BadDataError(
        f'data.text_key={text_key!r} holds {kind}, not text, in {file.name!r}; '
        f'the keys are {", ".join(schema.names)}'
      )
  return rows


def _damaged_parquet(parquet, paths, text_key, error):
  """Returns an error that names the first row group which cannot be read."""
  for file in paths:
    opened = parquet.ParquetFile(file.path)
    for group in range(opened.num_row_groups):
      try:
        opened.read_row_group(group, columns=[text_key])
      except (OSError, ValueError) as found:
        return BadDataError(
          f'{file.name!r}: row group {group} cannot be read: {line(found)}'
        )
  return BadDataError(
    f'{paths[0].name!r} cannot be converted: {line(error.__cause__ or error)}'
  )


def _read_ends(source, counts):
  """Reads the first and the last record of every file."""
  start = 0
  for count in counts:
    for index in {start, start + count - 1} if count else ():
      _ = source[index]
    start += count


def _place(ends, index):
  """Returns which file holds a record, and which one of it that is."""
  number = int(np.searchsorted(ends, index, 'right'))
  return number, int(index - (ends[number - 1] if number else 0))


def _parse(data, where):
  try:
    return json.loads(data.strip())
  except (ValueError, RecursionError) as error:
    raise BadDataError(f'{where} is not JSON: {line(error)}') from error


def _text(record, key, where) -> str:
  """Returns the text of a record; none, or null, is an empty document."""
  if not isinstance(record, Mapping) or key not in record:
    raise BadDataError(
      f'data.text_key={key!r} is not in the records; '
      f'{nearest(key, _keys(record))} ({where})'
    )
  text = '' if record[key] is None else record[key]
  if not isinstance(text, str):
    raise BadDataError(
      f'data.text_key={key!r} holds {type(text).__name__}, not text, in '
      f'{where}; the keys are {", ".join(_keys(record))}'
    )
  try:
    text.isascii() or text.encode()
  except UnicodeEncodeError as error:
    raise BadDataError(f'{where} has half a character: {error}') from error
  return text


def _keys(record):
  """Returns the keys of a record for a message of one line."""
  if not isinstance(record, Mapping):
    return ['no keys at all']
  keys = itertools.islice(record, 100)
  return [key if key.isprintable() else repr(key) for key in keys]


RECORDS = {
  '.jsonl': JsonLines,
  '.parquet': _parquet,
  '.array_record': ArrayRecords,
}
