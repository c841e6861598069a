"""Formats of which a record is a document, with the text under a key.

Instead of text a record may hold a list of token ids; the first record says
which. A second key may hold the label of the document.

What is damaged is found as early as it is cheap to: files that cannot be read
or are of another kind when they are opened, with the first and the last record
of each; other records when they are read. JSON has to be UTF-8, and lines of
white space do not count.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from efficient_attn.data import files, optional
from efficient_attn.data.damage import BadDataError, line
from efficient_attn.data.files import File
from efficient_attn.data.sources import Part, Tokens
from efficient_attn.values import nearest

SPACE = b' \t\r\n'  # as JSON has it
WHITE = np.isin(np.arange(256), list(SPACE))
STRINGS = ('string', 'large_string', 'string_view')  # of Arrow


class Fields(NamedTuple):
  """Keys of a record, and what is under them.

  Attributes:
    text: the key of the text, or of its token ids.
    label: the key of the label; '' for none.
    tokenizer: the name of that of the ids, and how many it has.
  """

  text: str
  label: str = ''
  tokenizer: tuple[str, int] = ('bytes', 256)


class _Records:
  """Documents of records; `_record(index)` reads one and says where it is.

  Attributes:
    holds: text or ids.
  """

  def _start(self, fields: Fields, counts: Iterable[int]) -> None:
    """Reads the first and the last record of every file."""
    self._fields, self.holds = fields, 'text'
    if len(self):
      record, where = self._record(0)
      if isinstance(_value(record, 'text', fields.text, where), list):
        self.holds = 'ids'
    start = 0
    for count in counts:
      for index in {start, start + count - 1} if count else ():
        _ = self[index]
      start += count

  def __getitem__(self, index) -> list[Part] | list[Tokens]:
    record, where = self._record(index)
    fields = self._fields
    label = _label(record, fields.label, where) if fields.label else None
    if self.holds == 'ids':
      return [Tokens(_ids(record, fields, where), None, label=label)]
    return [Part(_text(record, fields, where), label=label)]


class JsonLines(_Records):
  """Lines of JSON; only their offsets are held."""

  def __init__(self, config_key: str, paths: Sequence[File], fields: Fields):
    self._files = paths
    indices = [_lines(i, file) for i, file in enumerate(paths)]
    self._index = np.concatenate(indices)
    self._start(fields, map(len, indices))

  def __len__(self):
    return len(self._index)

  def _record(self, index):
    number, start, stop = self._index[index].tolist()
    file = self._files[number]
    where = f'the line at byte {start} of {file.name!r}'
    return _parse(files.read(file, start, stop), where), where


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


class ArrayRecords(_Records):
  """Records that are text or, if the first one is, JSON objects."""

  def __init__(self, config_key: str, paths: Sequence[File], fields: Fields):
    optional.require('array_record', config_key, paths[0].name)
    self._files, self._key = paths, fields.text
    self._readers = [_array_record(file) for file in paths]
    self._ends = np.cumsum([len(reader) for reader in self._readers])
    self._json = len(self) > 0 and _is_json(self._bytes(0)[0])
    self._start(fields, map(len, self._readers))

  def __len__(self):
    return int(self._ends[-1])

  def _record(self, index):
    data, where = self._bytes(index)
    if self._json:
      return _parse(data, where), where
    try:
      return {self._key: data.decode()}, where
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


class Table(_Records):
  """A memory-mapped `datasets.Dataset`.

  Args:
    dataset: of which one column is text.
    fields: the names of its columns.
    names: of the dataset, in errors; or of the files that were joined to it.
    ends: how many rows it has up to the end of each file.
  """

  def __init__(
    self,
    dataset,
    fields: Fields,
    names: Sequence[str],
    ends: Sequence[int] | None = None,
  ):
    _check_keys(dataset.column_names, fields, repr(names[0]))
    self._dataset = dataset.select_columns(_columns(fields))
    self._names = names
    self._ends = np.array([len(dataset)] if ends is None else ends)
    self._start(fields, np.diff(self._ends, prepend=0))

  def __len__(self):
    return len(self._dataset)

  def _record(self, index):
    number, row = _place(self._ends, index)
    where = f'row {row} of {self._names[number]!r}'
    try:
      return self._dataset[int(index)], where
    except (OSError, ValueError) as error:  # Arrow's, and text's that is none
      raise BadDataError(f'{where} cannot be read: {line(error)}') from error


def _columns(fields):
  return list(dict.fromkeys(filter(None, (fields.text, fields.label))))


def _parquet(config_key, paths, fields):
  datasets = optional.require('datasets', config_key, paths[0].name)
  parquet = optional.require('pyarrow.parquet', config_key, paths[0].name)
  types = optional.require('pyarrow.types', config_key, paths[0].name)
  rows = [_parquet_rows(parquet, types, file, fields) for file in paths]
  filled = [file for file, count in zip(paths, rows, strict=True) if count]
  if not filled:
    return ()
  try:
    dataset = datasets.Dataset.from_parquet(
      [file.path for file in filled], columns=_columns(fields)
    )
  except datasets.exceptions.DatasetsError as error:
    raise _damaged_parquet(parquet, filled, fields, error) from error
  names = [file.name for file in filled]
  return Table(dataset, fields, names, np.cumsum([n for n in rows if n]))


def _parquet_rows(parquet, types, file, fields):
  """Returns the number of rows of a file whose schema is as it should be."""
  try:
    with open(file.path, 'rb') as stream:
      opened = parquet.ParquetFile(stream)
      schema, rows = opened.schema_arrow, opened.metadata.num_rows
  except (OSError, ValueError) as error:
    raise BadDataError(
      f'{file.name!r} is not a Parquet file, or damaged: {line(error)}'
    ) from error
  _check_keys(schema.names, fields, repr(file.name))
  for index in schema.get_all_field_indices(fields.text):
    kind = schema.types[index]
    value = kind.value_type if types.is_dictionary(kind) else kind
    lists = types.is_list(kind) or types.is_large_list(kind)
    ids = lists and types.is_integer(kind.value_type)
    if str(value) not in STRINGS and not ids:
      raise BadDataError(
        f'data.text_key={fields.text!r} holds {kind}, not text, in '
        f'{file.name!r}; the keys are {", ".join(schema.names)}'
      )
  return rows


def _damaged_parquet(parquet, paths, fields, error):
  """Returns an error that names the first row group which cannot be read."""
  for file in paths:
    opened = parquet.ParquetFile(file.path)
    for group in range(opened.num_row_groups):
      try:
        opened.read_row_group(group, columns=_columns(fields))
      except (OSError, ValueError) as found:
        return BadDataError(
          f'{file.name!r}: row group {group} cannot be read: {line(found)}'
        )
  return BadDataError(
    f'{paths[0].name!r} cannot be converted: {line(error.__cause__ or error)}'
  )


def _place(ends, index):
  """Returns which file holds a record, and which one of it that is."""
  number = int(np.searchsorted(ends, index, 'right'))
  return number, int(index - (ends[number - 1] if number else 0))


def _parse(data, where):
  try:
    return json.loads(data.strip())
  except (ValueError, RecursionError) as error:
    raise BadDataError(f'{where} is not JSON: {line(error)}') from error


def _check_keys(names, fields, where):
  """Raises unless the columns of a table have the keys."""
  record = dict.fromkeys(names)
  _value(record, 'text', fields.text, where)
  if fields.label:
    _value(record, 'label', fields.label, where)


def _value(record, what, key, where) -> Any:
  """Returns what a record has under `data.<what>_key`."""
  if not isinstance(record, Mapping) or key not in record:
    raise BadDataError(
      f'data.{what}_key={key!r} is not in the records; '
      f'{nearest(key, _keys(record))} ({where})'
    )
  return record[key]


def _text(record, fields, where) -> str:
  """Returns the text of a record; none, or null, is an empty document."""
  found = _value(record, 'text', fields.text, where)
  text = '' if found is None else found
  if not isinstance(text, str):
    raise _wrong_type(record, 'text', fields.text, 'text', where)
  try:
    text.isascii() or text.encode()
  except UnicodeEncodeError as error:
    raise BadDataError(f'{where} has half a character: {error}') from error
  return text


def _ids(record, fields, where) -> np.ndarray:
  """Returns the token ids of a record; none, or null, is an empty document."""
  found = _value(record, 'text', fields.text, where)
  try:
    ids = np.array([] if found is None else found)
  except ValueError:  # lists of unequal lengths
    ids = None
  if ids is None or (
    ids.size and (ids.ndim != 1 or ids.dtype.kind not in 'iu')
  ):
    wanted = 'text or token ids'
    if not isinstance(found, list):
      wanted = 'token ids, as the first record does'
    raise _wrong_type(record, 'text', fields.text, wanted, where)
  name, size = fields.tokenizer
  wrong = ids[(ids < 0) | (ids >= size)]
  if wrong.size:
    raise BadDataError(
      f'data.text_key={fields.text!r} holds the token {int(wrong[0])}, beyond '
      f'the {size} of data.tokenizer={name!r}, in {where}; name the tokenizer '
      'that made them'
    )
  return ids.astype(np.int32)


def _label(record, key, where) -> int | str:
  label = _value(record, 'label', key, where)
  if not isinstance(label, (int, str)):
    raise _wrong_type(record, 'label', key, 'an int or a str', where)
  return label


def _wrong_type(record, what, key, wanted, where):
  return BadDataError(
    f'data.{what}_key={key!r} holds {type(record[key]).__name__}, not {wanted},'
    f' in {where}; the keys are {", ".join(_keys(record))}'
  )


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
