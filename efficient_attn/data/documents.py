"""Which documents `data.path` names, and which of them validate.

A file validates if the sha256 of its name, relative to the folder that holds
them all, is 0 modulo `data.valid_every` (if none does, the one with the least
hash); a lone file gives its last part. Other records go by their number (see
`batches.held_out`). So the split depends on no seed. `data.valid_path` replaces
it; both paths may name one Hugging Face dataset, whose `train` and `validation`
splits are then used.
"""

import glob
import hashlib
import os
import sysconfig

import numpy as np

from efficient_attn.config import ConfigError, DataConfig, nearest
from efficient_attn.data import batches, optional, sources

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


def load(
  config: DataConfig, layout: sources.Layout
) -> tuple[sources.Source, sources.Source]:
  """Returns the training and the validation source."""
  train = _open('path', config)
  if config.valid_path:
    valid = _open('valid_path', config)
  else:
    train, valid = _split(train, config)
  return tuple(
    sources.Files(documents, layout)
    if isinstance(documents, list)
    else documents
    for documents in (train, valid)
  )


def _open(key, config):
  """Returns the spans of text files, or a source of records."""
  path = getattr(config, key)
  if path.startswith('hf:'):
    split = 'train' if key == 'path' else 'validation'
    documents = _hugging_face(f'data.{key}', path, split, config.text_key)
  elif not path:
    documents = _spans(standard_library())
  else:
    documents = _files(f'data.{key}', path, config.text_key)
  if not len(documents):
    raise ConfigError(f'data.{key}={path!r} has no text; name another file')
  _ = documents[0]  # a wrong data.text_key fails here
  return documents


def standard_library() -> list[str]:
  """Returns the `.py` files of this Python, without `SKIPPED_FOLDERS`."""
  root = sysconfig.get_paths()['stdlib']
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
    paths += [os.path.join(folder, n) for n in names if n.endswith('.py')]
  return sorted(paths)


def _files(key, path, text_key):
  paths = [path] if os.path.isfile(path) else []
  paths = paths or sorted(
    filter(os.path.isfile, glob.glob(path, recursive=True))
  )
  if not paths:
    folder = ' (a folder: add /*.jsonl or the like)' * os.path.isdir(path)
    raise ConfigError(
      f'{key}={path!r}{folder}: no such file; give a file, a glob, or '
      "'hf:<dataset>'"
    )
  suffixes = {os.path.splitext(p)[1] for p in paths}
  if len(suffixes) > 1:
    raise ConfigError(
      f'{key}={path!r} matches {sorted(suffixes)}; give one kind of file'
    )
  (suffix,) = suffixes
  if suffix == '.txt':
    return _spans(paths)
  if suffix not in sources.RECORDS:
    raise ConfigError(
      f'{key}={path!r}: cannot read {suffix!r} files; '
      f'{nearest(suffix, (".txt", *sources.RECORDS))}'
    )
  return sources.RECORDS[suffix](key, paths, text_key)


def _spans(paths):
  sizes = [(path, os.path.getsize(path)) for path in paths]
  return [sources.Span(path, 0, size) for path, size in sizes if size]


def _hugging_face(key, path, split, text_key):
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
    reason = str(error).partition('\n')[0]
    raise ConfigError(
      f'{key}={path!r} cannot be opened ({reason}); give '
      "'hf:<folder of save_to_disk>' or 'hf:<owner>/<name>[/<subset>]'"
    ) from error
  if isinstance(dataset, dict):
    if split not in dataset:
      raise ConfigError(
        f'{key}={path!r} has no split {split!r}; it has {", ".join(dataset)}'
      )
    dataset = dataset[split]
  return sources.Table(dataset, text_key)


def _split(documents, config):
  """Returns (training, validation) documents."""
  every = config.valid_every
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
    folder = os.path.commonpath([os.path.dirname(s.path) for s in documents])
    names = [os.path.relpath(s.path, folder) for s in documents]
    held = [validates(name, every) for name in names]
    if not any(held):
      held = [name == min(names, key=_hash) for name in names]
    split = [
      [s for s, valid in zip(documents, held, strict=True) if valid == wanted]
      for wanted in (False, True)
    ]
  if not all(len(part) for part in split):
    raise ConfigError(
      f'data.path={config.path!r} has too little text to hold out one part in '
      f'data.valid_every={every}; give data.valid_path'
    )
  return split


def validates(name: str, every: int) -> bool:
  """Returns whether the file of this relative name is one in `every`."""
  return _hash(name) % every == 0


def _hash(name):
  return int(hashlib.sha256(name.encode()).hexdigest(), 16)
