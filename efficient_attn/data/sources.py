"""Random access to documents of text: `len(source)`, `source[i]` -> parts.

In the formats of `records` record i is a document. Text files are long, so
record i of them is the i-th piece of their concatenation: shuffling the records
then mixes pieces of all files, and nothing is read before it is needed.
"""

import codecs
import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from efficient_attn.data import files
from efficient_attn.data.damage import BadDataError, allowed
from efficient_attn.data.tokenizer import Tokenizer

# Not absl's, which checkpoints silence.
LOG = logging.getLogger('efficient_attn.data')

CONTINUATION = bytes(range(0x80, 0xC0))  # bytes that do not start a character


class Part(NamedTuple):
  """A document, or a piece of one."""

  text: str | bytes
  begins: bool = True  # at the beginning of the document
  ends: bool = True
  before: bytes = b''  # up to four bytes of the document before this piece
  label: int | str | None = None


class Tokens(NamedTuple):
  """A document, or a piece of one, that was tokenized before.

  Attributes:
    ids: int32 [N].
    sizes: [N], bytes of text that each stands for; None if it is not known.
    begins: at the beginning of the document.
    ends: at its end.
    previous: the token before this piece; None if there is none, -1 if it is
      not known.
    dropped: bytes of the document that no token stands for, if it ends here.
    label: of the document.
  """

  ids: np.ndarray
  sizes: np.ndarray | None
  begins: bool = True
  ends: bool = True
  previous: int | None = None
  dropped: int = 0
  label: int | str | None = None


def tokenized(part: Part | Tokens, tokenizer: Tokenizer) -> Tokens:
  """Returns the tokens of a part, which may be tokenized already."""
  if isinstance(part, Tokens):
    return part
  ids, sizes = tokenizer.encode_sized(part.text)
  previous = None
  if part.before:
    before = tokenizer.encode(part.before)
    previous = before[-1] if len(before) else -1
  return Tokens(
    ids,
    sizes,
    begins=part.begins,
    ends=part.ends,
    previous=previous,
    # What the tokenizer drops has bytes, too.
    dropped=0 if len(ids) else len(as_bytes(part.text)),
    label=part.label,
  )


def as_bytes(text: str | bytes) -> bytes:
  """Returns text as UTF-8."""
  return text.encode() if isinstance(text, str) else text


class Span(NamedTuple):
  """The document that is bytes [start, stop) of a file."""

  file: files.File
  start: int
  stop: int


class Source(Protocol):
  """What the text pipeline reads; a damaged record is a `BadDataError`."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> list[Part] | list[Tokens]: ...


@dataclasses.dataclass(frozen=True)
class Layout:
  """The cuts of long documents into pieces.

  Attributes:
    piece: Bytes of a piece of text files, the end of each document counting as
      one.
    tokens: Tokens of a piece of a document of a token cache.
    marks: 1, or 2 if the beginning of a document also counts as one.
    lines: Whether to move a cut to the next line, or character if lines are
      long, so that no token straddles it. The files must then be UTF-8; a piece
      that is not is damaged.
  """

  piece: int
  tokens: int
  marks: int
  lines: bool


class Files:
  """Pieces of the concatenation of `spans`."""

  def __init__(self, spans: Sequence[Span], layout: Layout):
    self._spans, self._layout = spans, layout
    sizes = [span.stop - span.start + layout.marks for span in spans]
    self._ends = np.cumsum(sizes)
    if layout.lines:
      for span in spans:  # a file of another encoding is seen at its head
        stop = min(span.start + files.SAMPLE, span.stop)
        _check_utf8(
          span.file,
          span.start,
          files.read(*span._replace(stop=stop)),
          stop == span.stop,
        )

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
    data = files.read(span.file, known, stop)
    if self._layout.lines:
      _check_utf8(span.file, start, data[start - known :])
    return Part(data[start - known :], begins, ends, data[: start - known])

  def _cut(self, span, offset):
    if not self._layout.lines or offset in (span.start, span.stop):
      return offset
    return next_line(span, offset, self._layout.piece)


def _check_utf8(file, start, data, final=True):
  """Raises unless the bytes from `start` on are UTF-8, or its beginning."""
  try:
    codecs.getincrementaldecoder('utf-8')().decode(data, final)
  except UnicodeDecodeError as error:
    raise BadDataError(
      f'{file.name!r}: byte {start + error.start} is not UTF-8; convert the '
      "file, or read bytes by data.tokenizer='bytes'"
    ) from error


def next_line(span: Span, offset: int, limit: int) -> int:
  """Returns where the first line after `offset` starts, or a character."""
  window = files.read(span.file, offset, min(offset + limit, span.stop))
  line = window.find(b'\n') + 1
  return offset + (line or len(window) - len(window.lstrip(CONTINUATION)))


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The records of a source with the given numbers."""

  source: Source
  numbers: np.ndarray

  def __len__(self):
    return len(self.numbers)

  def __getitem__(self, index) -> list[Part] | list[Tokens]:
    return self.source[int(self.numbers[index])]


class Tolerant:
  """A source whose damaged records are empty documents.

  Which ones are empty depends on the records alone, so that a run resumes
  exactly. Each process logs and counts those that it meets, once.
  """

  def __init__(self, source: Source):
    self._source = source
    self._damaged = set()

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index) -> list[Part] | list[Tokens]:
    try:
      return self._source[index]
    except BadDataError as error:
      self._skip(int(index), error)
      return [Part('')]

  def _skip(self, index, error):
    if index in self._damaged:
      return
    count, limit = len(self._damaged) + 1, allowed(len(self))
    if count > limit:
      raise BadDataError(
        f'{error} (damaged record {count} of {len(self)}, of which {limit} may '
        'be skipped; repair or remove them)'
      ) from error
    self._damaged.add(index)
    LOG.warning(
      'skipped a damaged record, %d so far (up to %d may be): %s',
      *(count, limit, error),
    )
