"""Which documents `data.path` names, and which of them validate.

A file validates if the sha256 of its name, relative to the folder that holds
them all, is 0 modulo `data.valid_every` (if none does, the one with the least
hash); a lone file gives its last part. Other records go by their number (see
`batches.held_out`). So the split depends on no seed. `data.valid_path` replaces
it; both paths may name one Hugging Face dataset, whose `train` and `validation`
splits are then used.
"""

import functools
import glob
import hashlib
import os
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import (
  batches,
  files,
  optional,
  records,
  sources,
  token_cache,
)
from efficient_attn.data.damage import BadDataError, line
from efficient_attn.data.tokenizer import Tokenizer, load_tokenizer
from efficient_attn.values import nearest

# In the standard library's folder but not its text: installed packages,
# caches, and the tests, which some distributions leave out.
SKIPPED_FOLDERS = (
  'site-packages',
  'dist-packages',
  '__pycache__',
  'test',
  'tests',
  'idle_test',
)


class Documents(NamedTuple):
  """Both splits.

  Attributes:
    train: of which a run learns.
    valid: the others.
    fingerprint: a hash of the files that they come from.
    has_text: whether `valid` has the text itself, and not only tokens.
    sized: whether each token knows the bytes of text that it stands for.
  """

  train: sources.Source
  valid: sources.Source
  fingerprint: str
  has_text: bool
  sized: bool


def load(
  config: DataConfig,
  layout: sources.Layout,
  tokenizer: Tokenizer | None = None,
  prefix: str = 'data.',
) -> Documents:
  """Opens what `data.path` and `data.valid_path` name.

  Args:
    config: Names them.
    layout: Of the pieces of long documents.
    tokenizer: That of the config, if it was loaded before.
    prefix: Of `path` and `valid_path` in errors.
  """
  tokenizer = tokenizer or load_tokenizer(config.tokenizer)
  opened = functools.partial(
    _open,
    config=config,
    tokenizer=tokenizer,
    piece=layout.tokens,
    prefix=prefix,
  )
  train, fingerprint = opened('path')
  holds = {'train': _holds(train)}
  if config.valid_path:
    valid, other = opened('valid_path')
    holds['valid'] = _holds(valid)
    fingerprint += other
  else:
    train, valid = _split(train, config, prefix)
    holds['valid'] = holds['train']
  splits = (
    sources.Files(split, layout) if isinstance(split, list) else split
    for split in (train, valid)
  )
  return Documents(
    *map(sources.Tolerant, splits),
    fingerprint,
    has_text=holds['valid'] == 'text',
    sized='ids' not in holds.values(),
  )


def _holds(documents) -> str:
  return 'text' if isinstance(documents, list) else documents.holds


def _open(key, config, tokenizer, piece, prefix):
  """Returns spans of text files or a source of others, and a fingerprint."""
  path, name = getattr(config, key), f'{prefix}{key}'
  fields = records.Fields(
    config.text_key,
    config.label_key,
    (config.tokenizer, tokenizer.vocab_size),
  )
  if path.startswith('hf:'):
    split = 'train' if key == 'path' else 'validation'
    dataset = _hugging_face(name, path, split)
    documents = records.Table(dataset, fields, [path])
    fingerprint = _fingerprint(path, dataset)
  elif path.rstrip('/').endswith(token_cache.SUFFIX):
    if config.label_key:
      raise ConfigError(
        f'data.label_key={config.label_key!r}: {name}={path!r} stores no labels'
        '; name the text'
      )
    folders = _folders(name, path)
    documents = token_cache.load(
      name, folders, tokenizer, config.tokenizer, piece
    )
    fingerprint = token_cache.fingerprint(folders)
    if key == 'path' and not config.valid_path:
      _check_split(folders, config)
  else:
    paths = _paths(name, path) if path else standard_library()
    fingerprint = files.fingerprint(paths)
    documents = _files(name, path, paths, fields)
  if not len(documents):
    raise ConfigError(f'{name}={path!r} has no text; name another file')
  return documents, fingerprint


def standard_library() -> list[str]:
  """Returns the `.py` files of this Python, without `SKIPPED_FOLDERS`."""
  root = sysconfig.get_paths()['stdlib']
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
    paths += [os.path.join(folder, n) for n in names if n.endswith('.py')]
  return sorted(paths)


def _paths(key, path):
  """Returns the files that a path or glob names."""
  found = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
  for name in found:
    if not os.path.exists(name):
      raise BadDataError(f'{key}={path!r}: {name!r} is a link to no file')
  paths = sorted(filter(os.path.isfile, found))
  if not paths:
    folder = ' (a folder: add /*.jsonl or the like)' * os.path.isdir(path)
    raise ConfigError(
      f'{key}={path!r}{folder}: no such file; give a file, a glob, or '
      "'hf:<dataset>'"
    )
  return paths


def _folders(key, path):
  """Returns the caches of tokens that a path or glob names."""
  found = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
  folders = sorted(map(pathlib.Path, filter(os.path.isdir, found)))
  if not folders:
    raise ConfigError(
      f'{key}={path!r}: no such folder; write it by launch/tokenize_text.py, '
      'or name the text'
    )
  return folders


def _check_split(folders, config):
  """Raises unless caches were split as the config says."""
  for folder in folders:
    text = token_cache.read_index(folder).text
    if not text.valid_path and text.valid_every != config.valid_every:
      raise ConfigError(
        f'data.valid_every={config.valid_every}: {str(folder)!r} was split by '
        f'{text.valid_every}; set that, or give data.valid_path'
      )


def _files(key, path, paths, fields):
  kinds = {files.kind(p) for p in paths} if path else {'.txt'}
  if len(kinds) > 1:
    raise ConfigError(
      f'{key}={path!r} matches {sorted(kinds)}; give one kind of file'
    )
  (kind,) = kinds
  if kind not in FORMATS:
    raise ConfigError(
      f'{key}={path!r}: cannot read {kind!r} files; {nearest(kind, FORMATS)}'
    )
  opened = [files.plain(key, p) for p in paths]
  return FORMATS[kind](key, opened, fields)


def _spans(key, paths, fields):
  if fields.label:
    raise ConfigError(
      f'data.label_key={fields.label!r}: text files have no keys; name files '
      f'of records by {key}, such as .jsonl'
    )
  sizes = [(file, files.size(file)) for file in paths]
  return [sources.Span(file, 0, size) for file, size in sizes if size]


# By the end of the name; those that are read from front to back may be
# compressed.
FORMATS = {'.txt': _spans} | records.RECORDS
FORMATS |= {
  kind + suffix: FORMATS[kind]
  for kind in ('.txt', '.jsonl')
  for suffix in files.COMPRESSED
}


def _hugging_face(key, path, split):
  """Opens 'hf:<folder>', 'hf:<owner>/<name>' or '...<name>/<subset>'."""
  datasets = optional.require('datasets', key, path)
  name = path.removeprefix('hf:')
  try:
    if os.path.isdir(name):
      dataset = datasets.load_from_disk(name)
    else:
      owner_and_name, subset = name.split('/')[:2], name.split('/')[2:]
      dataset = datasets.load_dataset('/'.join(owner_and_name), *subset)
  except Exception as error:  # the library and its network raise many kinds
    raise ConfigError(
      f'{key}={path!r} cannot be opened ({line(error)}); give '
      "'hf:<folder of save_to_disk>' or 'hf:<owner>/<name>[/<subset>]'"
    ) from error
  if isinstance(dataset, dict):
    if split not in dataset:
      raise ConfigError(
        f'{key}={path!r} has no split {split!r}; it has {", ".join(dataset)}'
      )
    dataset = dataset[split]
  return dataset


def _fingerprint(path, dataset):
  """Returns that of a folder's files, or what the library calls so."""
  folder = path.removeprefix('hf:')
  if not os.path.isdir(folder):
    return dataset._fingerprint
  inside = glob.glob(
    os.path.join(glob.escape(folder), '**/*.arrow'), recursive=True
  )
  return files.fingerprint(inside)


def _split(documents, config, prefix):
  """Returns (training, validation) documents."""
  every = config.valid_every
  if isinstance(documents, token_cache.Cache):
    return documents.halves()
  if not isinstance(documents, list):
    held = batches.held_out(len(documents), every)
    split = [
      sources.Chosen(documents, np.flatnonzero(chosen))
      for chosen in (~held, held)
    ]
  elif len(documents) == 1:
    (span,) = documents
    cut = sources.next_line(span, span.stop - span.stop // every, 2**16)
    split = [[span._replace(stop=cut)], [span._replace(start=cut)]]
    split = [[s for s in spans if s.start < s.stop] for spans in split]
  else:
    names = files.relative([span.file.name for span in documents])
    held = [validates(name, every) for name in names]
    if not any(held):
      held = [name == min(names, key=_hash) for name in names]
    split = [
      [s for s, valid in zip(documents, held, strict=True) if valid == wanted]
      for wanted in (False, True)
    ]
  if not all(len(part) for part in split):
    raise ConfigError(
      f'{prefix}path={config.path!r} has too little text to hold out one part '
      f'in data.valid_every={every}; give {prefix}valid_path'
    )
  return split


def validates(name: str, every: int) -> bool:
  """Returns whether the file of this relative name is one in `every`."""
  return _hash(name) % every == 0


def _hash(name):
  return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16)
