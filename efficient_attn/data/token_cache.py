"""Text that was tokenized once, `data.path='x.tokens'`: memory-mapped ids.

`launch/tokenize_text.py` writes a folder that ends in .tokens:

  index.json              see `Index`
  train-00000.ids.npy     [N] ids of a shard, the documents one after the other
  train-00000.sizes.npy   [N] bytes of text that each id stands for; only if the
                          tokenizer alone does not say it
  train-00000.ends.npy    [D, 2] int64: where each document that ends in this
                          shard does so, counted in its ids, and how many bytes
                          of it no id stands for
  train-00001.ids.npy     ...; a document may go on in the next shard
  valid-00000.ids.npy     ...

The splits are those that the text has, documents in its order; tokens that mark
their ends are not stored, as `data.packing` decides about them. A shard counts
once the index names it.

A record of the data is a document, or a piece of a long one.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.data import files
from efficient_attn.data.damage import BadDataError, line
from efficient_attn.data.sources import Tokens
from efficient_attn.data.tokenizer import Tokenizer
from efficient_attn.values import NonNegative, OneOf, Positive, build_group

VERSION = 1
SUFFIX = '.tokens'
AGAIN = 'run the command of launch/tokenize_text.py that made it again'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
  """The tokenizer that made the ids."""

  name: str
  fingerprint: str
  vocab_size: Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFacts:
  """The text that was tokenized: keys of the data, and a hash of its files."""

  path: str
  valid_path: str
  valid_every: Positive
  text_key: str
  fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitFacts:
  """The number of records of a split, in all and in a shard."""

  records: Positive
  a_shard: Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardFacts:
  """The contents of a shard; the bytes are those of its text."""

  tokens: NonNegative
  documents: NonNegative
  bytes: NonNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
  """The content of `index.json`.

  Attributes:
    version: of the format.
    tokenizer: of the ids.
    text: what they stand for.
    dtype: of the ids.
    sized: whether there are sizes.
    train: of the split.
    valid: of the other one.
    shards: those that are written, by their names.
  """

  version: int
  tokenizer: TokenizerFacts
  text: TextFacts
  dtype: Annotated[str, OneOf(('uint8', 'uint16', 'uint32'))]
  sized: bool
  train: SplitFacts
  valid: SplitFacts
  shards: Mapping[str, ShardFacts] = dataclasses.field(default_factory=dict)

  def names(self) -> list[str]:
    """Returns all shards, also those not yet written."""
    return [
      f'{name}-{number:05}'
      for name, split in (('train', self.train), ('valid', self.valid))
      for number in range(-(-split.records // split.a_shard))
    ]

  def total(self, what: str) -> int:
    """Returns the number of tokens, documents or bytes of all shards."""
    return sum(getattr(shard, what) for shard in self.shards.values())


def read_index(folder: pathlib.Path) -> Index:
  """Reads the index of a cache.

  Raises:
    ConfigError: there is none, or it is none of this version.
  """
  file = folder / 'index.json'
  try:
    values = json.loads(file.read_text())
    version = values['version']
  except OSError as error:
    raise ConfigError(
      f'{str(file)!r} cannot be read ({error.strerror}); {str(folder)!r} is to '
      'be a folder that launch/tokenize_text.py wrote'
    ) from error
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    raise _no_index(file, error) from error
  if version != VERSION:
    raise ConfigError(
      f'{str(file)!r} has the version {version!r} and this program reads '
      f'{VERSION}; tokenize the text anew'
    )
  try:
    return build_group(Index, values, '')
  except (ConfigError, TypeError) as error:  # a key is wrong, or missing
    raise _no_index(file, error) from error


def _no_index(file, error):
  return BadDataError(
    f'{str(file)!r} is no index of tokens ({line(error)}); delete the folder '
    'and tokenize the text anew'
  )


class Shard(NamedTuple):
  """A shard of a cache."""

  folder: pathlib.Path
  name: str
  index: Index

  @property
  def columns(self) -> tuple[str, ...]:
    """The arrays of a number for each token."""
    return ('ids', 'sizes') if self.index.sized else ('ids',)

  def file(self, column: str) -> pathlib.Path:
    """Returns the file of one of its arrays."""
    return self.folder / f'{self.name}.{column}.npy'

  def array(self, column: str) -> np.ndarray:
    """Maps one of its arrays into memory.

    Raises:
      BadDataError: the file is missing, cut off or another one.
    """
    facts = self.index.shards[self.name]
    shape = (facts.tokens,)
    if column == 'ends':
      shape = (facts.documents, 2)
    file = self.file(column)
    try:
      # An array of nothing cannot be mapped.
      found = np.load(file, mmap_mode='r' if 0 not in shape else None)
      if not isinstance(found, np.ndarray):
        raise ValueError('several arrays')
    except (OSError, ValueError, EOFError) as error:
      raise BadDataError(
        f'{str(file)!r} is missing or damaged ({line(error)}); {AGAIN}'
      ) from error
    wrong = found.shape != shape or (
      column == 'ids' and found.dtype != self.dtype
    )
    if wrong:
      raise BadDataError(
        f'{str(file)!r} holds {found.dtype} {list(found.shape)}, and the index '
        f'says {list(shape)}; {AGAIN}'
      )
    return found

  @property
  def dtype(self) -> np.dtype:
    """Of its ids."""
    return np.dtype(self.index.dtype)


class Cache:
  """Documents of the shards of one cache or several.

  Args:
    shards: of which documents follow each other.
    piece: tokens of a piece of a long document.
    vocab_size: of the tokenizer.

  Attributes:
    holds: ids or sized_ids.
  """

  def __init__(self, shards: list[Shard], piece: int, vocab_size: int):
    self._shards, self._piece, self._vocab_size = shards, piece, vocab_size
    sized = {shard.index.sized for shard in shards}
    self.holds = 'sized_ids' if sized == {True} else 'ids'
    self._maps = {}
    counts = [shard.index.shards[shard.name].tokens for shard in shards]
    self._starts = np.cumsum([0, *counts])
    ends, whole = [np.zeros((0, 2), np.int64)], True
    for number, shard in enumerate(shards):
      for column in shard.columns:
        self._map(number, column)
      own = shard.array('ends')
      whole = whole and (own[-1:, 0] <= counts[number]).all()
      ends.append(own + [self._starts[number], 0])
    self._ends, self._dropped = np.concatenate(ends).T
    lengths = np.diff(self._ends, prepend=0)
    whole = whole and (lengths >= 0).all() and sum(lengths) == sum(counts)
    if not whole:
      raise BadDataError(
        f'{str(shards[0].folder)!r} has documents that do not add up to its '
        f'tokens; {AGAIN}'
      )
    self._pieces = np.cumsum(np.maximum(-(-lengths // piece), 1))

  def __len__(self):
    return int(self._pieces[-1]) if len(self._pieces) else 0

  def __getstate__(self):
    """Other processes map the files themselves."""
    return self.__dict__ | {'_maps': {}}

  def __getitem__(self, index) -> list[Tokens]:
    document = int(np.searchsorted(self._pieces, index, 'right'))
    first = int(self._pieces[document - 1]) if document else 0
    begin = int(self._ends[document - 1]) if document else 0
    end = int(self._ends[document])
    start = begin + (int(index) - first) * self._piece
    stop = min(start + self._piece, end)
    begins, ends = start == begin, stop == end
    known = start if begins else start - 1
    ids = self._read('ids', known, stop)
    if ids.size and ids.max() >= self._vocab_size:
      raise BadDataError(
        f'{self._where(start)} holds the token {ids.max()}, beyond the '
        f'{self._vocab_size} of data.tokenizer; {AGAIN}'
      )
    sizes = None
    if self.holds == 'sized_ids':
      sizes = self._read('sizes', start, stop)
    return [
      Tokens(
        ids[start - known :],
        sizes,
        begins=begins,
        ends=ends,
        previous=None if begins else int(ids[0]),
        dropped=int(self._dropped[document]) if ends else 0,
      )
    ]

  def halves(self) -> list['Cache']:
    """Returns training and validation."""
    return [
      Cache(
        [shard for shard in self._shards if shard.name.startswith(split)],
        self._piece,
        self._vocab_size,
      )
      for split in ('train', 'valid')
    ]

  def _read(self, column, start, stop):
    """Returns numbers [start, stop) of all shards as one array."""
    first, last = np.searchsorted(self._starts, (start, stop - 1), 'right') - 1
    parts = [np.zeros(0, np.int32)]
    for number in range(first, last + 1) if start < stop else ():
      origin = self._starts[number]
      array = self._map(number, column)
      parts.append(array[max(start - origin, 0) : stop - origin])
    return np.concatenate(parts).astype(np.int32)

  def _map(self, number, column):
    if (number, column) not in self._maps:
      self._maps[number, column] = self._shards[number].array(column)
    return self._maps[number, column]

  def _where(self, token):
    number = int(np.searchsorted(self._starts, token, 'right')) - 1
    return repr(str(self._shards[number].file('ids')))


def load(
  key: str,
  folders: list[pathlib.Path],
  tokenizer: Tokenizer,
  name: str,
  piece: int,
) -> Cache:
  """Opens caches.

  Args:
    key: what names them in the config.
    folders: of each.
    tokenizer: that of the run, which has to be theirs.
    name: of the tokenizer.
    piece: tokens of a piece of a long document.
  """
  shards = []
  for folder in folders:
    index = read_index(folder)
    theirs = index.tokenizer
    if theirs.fingerprint != tokenizer.fingerprint:
      same = theirs.name == name
      raise ConfigError(
        f'{key}={str(folder)!r} holds tokens of data.tokenizer='
        f'{theirs.name!r}, and {"that file has changed" if same else name!r}'
        f'{"" if same else " is another"}; set data.tokenizer, or tokenize the '
        'text anew'
      )
    names = index.names()
    missing = [n for n in names if n not in index.shards]
    if missing:
      raise ConfigError(
        f'{key}={str(folder)!r} has {len(names) - len(missing)} of '
        f'{len(names)} shards; {AGAIN}, which continues'
      )
    shards += [Shard(folder, n, index) for n in names]
  return Cache(shards, piece, tokenizer.vocab_size)


def fingerprint(folders: list[pathlib.Path]) -> str:
  """Returns a hash of the files of caches."""
  paths = [
    str(file)
    for folder in folders
    for file in (*folder.glob('*.npy'), folder / 'index.json')
  ]
  return files.fingerprint(paths)
