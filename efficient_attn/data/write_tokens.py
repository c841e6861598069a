"""Tokenizes text into the files that `token_cache` describes.

A shard is a run of consecutive records. Its files get their names when they are
complete, and the index, which alone decides what counts, names it after that.
So a run that is killed loses the shards that it was writing.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
from collections.abc import Iterator

import numpy as np
import tqdm

from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import batches, documents, sources
from efficient_attn.data.token_cache import (
  SUFFIX,
  VERSION,
  Index,
  Shard,
  ShardFacts,
  SplitFacts,
  TextFacts,
  TokenizerFacts,
  read_index,
)
from efficient_attn.data.tokenizer import ByteTokenizer, load_tokenizer

PIECE = 2**20  # bytes of a text file that are tokenized at once
SHARD = 2**25  # bytes of text of a shard
OF_TEXT = ('path', 'valid_path', 'valid_every', 'text_key')


def write(
  config: DataConfig, out: str, *, workers: int = 1, shard_bytes: int = SHARD
) -> tuple[Index, int]:
  """Tokenizes the text of a config, or continues to.

  Args:
    config: names the text and the tokenizer.
    out: the folder to write, which ends in .tokens.
    workers: processes.
    shard_bytes: of text of a shard, about.

  Returns:
    The index, and how many shards are new.

  Raises:
    ConfigError: it cannot be done, or `out` holds tokens of something else.
  """
  folder = pathlib.Path(out)
  if folder.suffix != SUFFIX:
    raise ConfigError(f'--out={out!r} must end in {SUFFIX}, as {out}{SUFFIX}')
  for key in ('mixture', 'label_key'):
    if getattr(config, key):
      raise ConfigError(
        f'data.{key}={getattr(config, key)!r}: tokens of one text without '
        'labels can be stored; leave it out, and name the path of each text'
      )
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f'--out={out!r} is a file; name a folder')
  writer = _Writer(config, folder, shard_bytes)
  index = writer.index
  if (folder / 'index.json').exists():
    index = _continued(read_index(folder), index, folder)
  elif folder.exists() and any(folder.iterdir()):
    raise ConfigError(
      f'--out={out!r} holds other files; name a new folder, or delete it'
    )
  folder.mkdir(parents=True, exist_ok=True)
  missing = [n for n in index.names() if n not in index.shards]
  with tqdm.tqdm(
    total=len(index.names()),
    initial=len(index.shards),
    unit='shard',
    disable=not missing,
  ) as bar:
    for name, facts in _made(writer, missing, workers):
      shards = {**index.shards, name: facts}
      index = dataclasses.replace(index, shards=shards)
      _save(index, folder)
      bar.update()
      bar.set_postfix_str(f'{index.total("tokens"):,} tokens')
  return index, len(missing)


def _continued(found, expected, folder) -> Index:
  """Returns the index of earlier runs, without shards that were damaged.

  Raises:
    ConfigError: it is of another text, tokenizer or size of shards.
  """
  ours, theirs = map(_identity, (expected, found))
  for key, value in ours.items():
    if value != theirs[key]:
      raise ConfigError(
        f'--out={str(folder)!r} holds tokens of another {key}: '
        f'{theirs[key]!r}, and this is {value!r}; name a new folder, or delete '
        'it'
      )
  shards = dict(found.shards)
  for name in found.shards:
    shard = Shard(folder, name, found)
    try:
      for column in (*shard.columns, 'ends'):
        shard.array(column)
    except ConfigError:
      del shards[name]
  return dataclasses.replace(found, shards=shards)


def _identity(index):
  """Returns what has to be equal to continue; paths may be spelled anew."""
  return {
    'tokenizer': index.tokenizer.fingerprint,
    'text': index.text.fingerprint,
    'text_key': index.text.text_key,
    'valid_every': index.text.valid_every,
    'size of shards': (index.train, index.valid),
  }


def _save(index, folder):
  new = folder / 'index.json.new'
  new.write_text(json.dumps(dataclasses.asdict(index), indent=1) + '\n')
  os.replace(new, folder / 'index.json')


class _Writer:
  """Writes shards of a text.

  Attributes:
    index: of no shard yet.
  """

  def __init__(self, config: DataConfig, folder: pathlib.Path, shard_bytes):
    self._folder = folder
    self._tokenizer = tokenizer = load_tokenizer(config.tokenizer)
    exact = isinstance(tokenizer, ByteTokenizer)
    layout = sources.Layout(piece=PIECE, tokens=PIECE, marks=1, lines=not exact)
    found = documents.load(config, layout, tokenizer)
    self._splits = {'train': found.train, 'valid': found.valid}
    self.index = Index(
      version=VERSION,
      tokenizer=TokenizerFacts(
        name=config.tokenizer,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
      ),
      text=TextFacts(
        fingerprint=found.fingerprint,
        **{key: getattr(config, key) for key in OF_TEXT},
      ),
      dtype=np.min_scalar_type(tokenizer.vocab_size - 1).name,
      sized=found.sized and not exact,
      train=_facts(found.train, shard_bytes),
      valid=_facts(found.valid, shard_bytes),
    )

  def shard(self, name: str) -> ShardFacts:
    """Writes a shard and returns what the index says about it."""
    split, number = name.split('-')
    count = getattr(self.index, split).a_shard
    source = self._splits[split]
    start = int(number) * count
    shard = Shard(self._folder, name, self.index)
    columns = {column: [np.zeros(0, int)] for column in shard.columns}
    ends, tokens, size = [], 0, 0
    for i in range(start, min(start + count, len(source))):
      for part in source[i]:
        piece = sources.tokenized(part, self._tokenizer)
        tokens += len(piece.ids)
        size += _size(part)
        for column, arrays in columns.items():
          arrays.append(_narrow(getattr(piece, column)))
        if piece.ends:
          ends.append((tokens, piece.dropped))
    arrays = {
      column: np.concatenate(arrays[1:] or arrays)
      for column, arrays in columns.items()
    }
    arrays['ids'] = arrays['ids'].astype(shard.dtype)
    arrays['ends'] = np.array(ends, np.int64).reshape(-1, 2)
    for column, array in arrays.items():
      file = shard.file(column)
      new = file.with_suffix('.new')
      with open(new, 'wb') as stream:
        np.save(stream, array)
      os.replace(new, file)
    return ShardFacts(tokens=tokens, documents=len(ends), bytes=size)


def _facts(split, shard_bytes, most=64):
  """Sizes the shards of a split by some of its records, evenly spread."""
  numbers = np.unique(np.linspace(0, len(split) - 1, most).astype(int))
  parts = [part for i in numbers for part in split[int(i)]]
  mean = max(sum(map(_size, parts)) / len(numbers), 1)
  a_shard = max(1, int(shard_bytes / mean))
  return SplitFacts(records=len(split), a_shard=a_shard)


def _size(part) -> int:
  """Returns the bytes of text of a part; of its ids, if these are all."""
  if isinstance(part, sources.Tokens):
    return len(part.ids) if part.sizes is None else int(part.sizes.sum())
  return len(sources.as_bytes(part.text))


def _narrow(array):
  """Returns numbers >= 0 in the smallest type that holds them."""
  return array.astype(np.min_scalar_type(array.max(initial=0)))


def _made(writer, names, workers) -> Iterator[tuple[str, ShardFacts]]:
  """Writes shards, in any order."""
  if min(workers, len(names)) < 2:
    for name in names:
      yield name, writer.shard(name)
    return
  with concurrent.futures.ProcessPoolExecutor(
    min(workers, len(names)),
    multiprocessing.get_context('spawn'),
    _start,
    (writer,),
  ) as pool:
    running = {pool.submit(_write, name): name for name in names}
    try:
      for done in concurrent.futures.as_completed(running):
        yield running[done], done.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


_writers = []  # that of this process


def _start(writer):
  batches.end_with_parent()
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says it
  _writers[:] = [writer]


def _write(name):
  return _writers[0].shard(name)
