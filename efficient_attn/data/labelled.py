"""Labelled sequences: documents of text, or the pixels of digits, with a class.

Batches are `dict(tokens, segment_ids [B, T] int32, label [B] int32, weight [B]
float32)`, with segment id 1 for tokens and 0 for padding, and weight 0 where an
example does not count.

Text: `data.label_key` names the label of a record, an int or a string. The
classes are the sorted labels of both splits. A document ends with the
tokenizer's end token; `data.seq_len` tokens of it are taken, or zeros added.

Pixels: scikit-learn's digits row by row, 64 intensities from 0 to 16, split as
by `data.name='digits'`.
"""

import hashlib

import grain
import numpy as np

from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import batches, digits, documents, sources
from efficient_attn.data.tokenizer import Tokenizer, load_tokenizer


def load(
  config: DataConfig, *, batch_size: int, seed: int, rows: range
) -> batches.Data:
  """Returns both splits of text; see `efficient_attn.data.load`."""
  key = f'data.label_key={config.label_key!r}'
  for other, unused in (('mixture', {}), ('corruption', '')):
    value = getattr(config, other)
    if value != unused:
      raise ConfigError(
        f'{key} is not possible with data.{other}={value!r}; leave one of them '
        'out'
      )
  if config.packing == 'segments':
    raise ConfigError(
      f"{key}: every document is a row, and data.packing='segments' puts "
      "several into one; use 'concat'"
    )
  tokenizer = load_tokenizer(config.tokenizer)
  # Records are whole documents.
  layout = sources.Layout(piece=1, tokens=1, marks=1, lines=False)
  found = documents.load(config, layout, tokenizer)
  classes = _classes(key, found.train, found.valid)
  train, valid = (
    _Documents(split, tokenizer, config.seq_len, classes)
    for split in (found.train, found.valid)
  )
  names = ', '.join(f'{i} {name}' for name, i in classes.items())
  named = len(classes) <= 20 and list(classes) != list(range(len(classes)))
  identity = f'{found.fingerprint} {tokenizer.fingerprint} {list(classes)}'
  return _data(
    train,
    valid,
    config,
    batch_size,
    seed,
    rows,
    tokenizer=tokenizer,
    vocab_size=tokenizer.vocab_size,
    num_classes=len(classes),
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    notes=(f'classes: {names}',) if named else (),
  )


def load_pixels(
  config: DataConfig, *, batch_size: int, seed: int, rows: range
) -> batches.Data:
  """Returns both splits of the digits; see `efficient_attn.data.load`."""
  train, valid = (_Pixels(valid=valid) for valid in (False, True))
  return _data(
    train,
    valid,
    config,
    batch_size,
    seed,
    rows,
    vocab_size=17,
    num_classes=10,
    fingerprint=hashlib.sha256(train.tokens.tobytes()).hexdigest(),
  )


def _data(train, valid, config, batch_size, seed, rows, **facts):
  shuffled = grain.MapDataset.source(train).seed(seed).shuffle().repeat()
  in_order = grain.MapDataset.source(valid).to_iter_dataset(batches.READ)
  return batches.Data(
    train=batches.endless(shuffled, batch_size, rows, config.workers),
    valid=batches.finite(in_order, batch_size, rows),
    example=_example(train.length),
    valid_example=_example(valid.length),
    **facts,
  )


def _classes(key, *splits) -> dict[int | str, int]:
  """Returns the number of each label."""
  records = (split[i] for split in splits for i in range(len(split)))
  labels = {part.label for record in records for part in record} - {None}
  kinds = {'str' if isinstance(label, str) else 'int' for label in labels}
  if len(kinds) > 1:
    raise ConfigError(f'{key} holds ints and strings; give all the same type')
  if len(labels) < 2:
    only = ', '.join(map(repr, labels)) or 'no label'
    raise ConfigError(
      f'{key} holds {only} in all records; name a key with two classes or more'
    )
  return {label: number for number, label in enumerate(sorted(labels))}


class _Documents:
  """Random access to the labelled documents of a split."""

  def __init__(self, source, tokenizer: Tokenizer, length: int, classes):
    self._source, self._tokenizer = source, tokenizer
    self._classes, self.length = classes, length
    self._end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    (part,) = self._source[index]
    ids = sources.tokenized(part, self._tokenizer).ids
    if part.label is None:  # a damaged record
      return _sequence(ids[:0], self.length, 0, 0)
    ids = np.concatenate([ids, self._end])[: self.length]
    return _sequence(ids, self.length, self._classes[part.label], len(ids) > 0)


class _Pixels:
  """Random access to the pixels of the digits of a split."""

  length = 64

  def __init__(self, valid: bool):
    images, self.labels = digits.split(valid=valid)
    self.tokens = images.reshape(len(images), self.length).astype(np.int32)

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return _sequence(self.tokens[index], self.length, self.labels[index], 1)


def _sequence(ids, length, label, weight):
  tokens, segment_ids = np.zeros((2, length), np.int32)
  tokens[: len(ids)] = ids
  segment_ids[: len(ids)] = 1
  return dict(
    tokens=tokens,
    segment_ids=segment_ids,
    label=np.int32(label),
    weight=np.float32(weight),
  )


def _example(length):
  return _sequence(np.zeros(length, np.int32), length, 0, 1)
