"""Text to token ids and back: raw bytes, or a Hugging Face tokenizer file.

The loss of any tokenizer can be reported in bits per byte of the text itself,
as it was before lower case, unknown words and the like: sum(loss) / log(2) over
the bytes that `encode_sized` gives the targets, which add up to the text's.
"""

import hashlib
import json
import pathlib
import re
from typing import Protocol

import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.data import optional
from efficient_attn.data.damage import BadDataError, line

# What tokenizers call the end of a document, when no file beside theirs says
# it: letters and slashes of names in brackets, such as <|endoftext|> or [EOS].
EOS_NAMES = (
  'endoftext',
  '/s',
  'eos',
  'imend',
  'endofsentence',
  'endofdocument',
  'endofsequence',
  'eostoken',
  'eod',
  'eot',
  'eotid',
  'sep',
)
MAX_IDS = 2**24  # far more than any model embeds, and ids have to be int32


class Tokenizer(Protocol):
  """What the text pipeline, sampling and evaluation need."""

  vocab_size: int
  eos_id: int | None  # ends a document, and stands before the first token
  mask_id: int | None  # stands for a token to be restored
  # [vocab_size] int32; None where only `encode_sized` can say it.
  token_bytes: np.ndarray | None
  fingerprint: str  # of what decides the ids
  known: np.ndarray  # [vocab_size] bool: false for gaps in the vocabulary

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns int32 ids, with no special tokens added."""

  def encode_sized(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids, and how many UTF-8 bytes of `text` each stands for."""

  def decode(self, ids) -> str:
    """Returns the text of known `ids`; invalid bytes become U+FFFD."""


class ByteTokenizer:
  """A token is a byte; byte 0, which text does not use, ends a document."""

  vocab_size = 256
  eos_id = 0
  mask_id = None
  fingerprint = 'bytes'

  def __init__(self):
    self.token_bytes = np.ones(256, np.int32)
    self.token_bytes[self.eos_id] = 0
    self.known = np.ones(256, bool)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the bytes of `text`."""
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def encode_sized(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of `text`, of one byte each."""
    ids = self.encode(text)
    return ids, np.ones_like(ids)

  def decode(self, ids) -> str:
    """Returns the text of known `ids`; invalid bytes become U+FFFD."""
    ids = _check_known(ids, self.known)
    return ids.astype(np.uint8).tobytes().decode(errors='replace')


class HFTokenizer:
  """A `tokenizer.json` of the `tokenizers` library."""

  token_bytes = None

  def __init__(self, path: str):
    file = pathlib.Path(path)
    if not file.is_file():
      folder = ' (a folder: add /tokenizer.json)' * file.is_dir()
      raise ConfigError(
        f"data.tokenizer={path!r}{folder}: no such file; give 'bytes' or the "
        'path of a tokenizer.json'
      )
    tokenizers = optional.require('tokenizers', 'data.tokenizer', path)
    try:
      data = file.read_bytes()
    except OSError as error:
      raise ConfigError(
        f'data.tokenizer={path!r} cannot be read: {error.strerror}'
      ) from error
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
      raise ConfigError(
        f'data.tokenizer={path!r} is not a tokenizer.json: {line(error)}'
      ) from error
    self._path = path
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    vocab = self._tokenizer.get_vocab()
    self.vocab_size = max(vocab.values(), default=-1) + 1
    if not 0 < self.vocab_size <= MAX_IDS:
      raise ConfigError(
        f'data.tokenizer={path!r} has {len(vocab)} tokens with ids up to '
        f'{self.vocab_size - 1}; ids must be below {MAX_IDS}'
      )
    self.eos_id = _end_token(file.parent, vocab)
    self.mask_id = _mask_token(file.parent, vocab)
    self.fingerprint = f'{hashlib.sha256(data).hexdigest()} {self.eos_id}'
    self.known = np.zeros(self.vocab_size, bool)
    self.known[list(vocab.values())] = True

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns int32 ids, with no special tokens added."""
    return np.array(self._encode(_string(text)).ids, np.int32)

  def encode_sized(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids, and how many UTF-8 bytes of `text` each stands for.

    A token has the bytes from the end of the one before it to its own, and the
    last one also what follows it, so that they add up to the text whatever the
    tokenizer drops, adds or changes. The first token of a character that is
    several has all of it.
    """
    text = _string(text)
    encoded = self._encode(text)
    ids = np.array(encoded.ids, np.int32)
    ends = np.array([end for _, end in encoded.offsets], int)
    ends = np.clip(np.maximum.accumulate(ends), 0, len(text))
    ends[-1:] = len(text)
    sizes = np.diff(_byte_offsets(text)[ends], prepend=0)
    return ids, sizes.astype(np.int32)

  def _encode(self, text):
    try:
      return self._tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises nothing narrower
      raise BadDataError(
        f'data.tokenizer={self._path!r} cannot encode {text[:20]!r}...: '
        f'{line(error)}'
      ) from error

  def decode(self, ids) -> str:
    """Returns the text of known `ids`; invalid bytes become U+FFFD."""
    return self._tokenizer.decode(_check_known(ids, self.known).tolist())


def _check_known(ids, known):
  """Returns ids as an array; one without text would vanish or be another."""
  ids = np.asarray(ids, np.int64)
  lost = ids[~np.isin(ids, np.flatnonzero(known))]
  if lost.size:
    raise ValueError(
      f'token {lost[0]} is not in the vocabulary of {known.sum()} tokens'
    )
  return ids


def _string(text):
  return text.decode(errors='replace') if isinstance(text, bytes) else text


def _byte_offsets(text):
  """Returns [len(text) + 1]: where each character starts in UTF-8."""
  if text.isascii():
    return np.arange(len(text) + 1)
  codes = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
  return np.concatenate([[0], np.cumsum(sizes)])


def _end_token(folder, vocab):
  """Returns the id of the token that ends a document, or None."""
  named = _named_token('eos_token', folder, vocab)
  if named is not None:
    return named
  found = _read_json(folder / 'generation_config.json').get('eos_token_id')
  known = set(vocab.values())
  for index in found if isinstance(found, list) else [found]:
    if isinstance(index, int) and index in known:
      return index
  bracketed = filter(_BRACKETS.match, sorted(vocab, key=vocab.get)[::-1])
  named = {re.sub('[^a-z/]', '', t.lower()): vocab[t] for t in bracketed}
  return next((named[name] for name in EOS_NAMES if name in named), None)


def _mask_token(folder, vocab):
  """Returns the id of the token that hides another, or None."""
  named = _named_token('mask_token', folder, vocab)
  names = (name for name in ('[MASK]', '<mask>') if name in vocab)
  return vocab.get(next(names, None)) if named is None else named


def _named_token(key, folder, vocab):
  """Returns the id of what files beside the tokenizer's name, or None."""
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    token = _read_json(folder / name).get(key)
    token = token.get('content') if isinstance(token, dict) else token
    if isinstance(token, str) and token in vocab:
      return vocab[token]
  return None


_BRACKETS = re.compile(r'[<\[{].*[>\]}]$', re.DOTALL)


def _read_json(file):
  """Returns the mapping in a file, which need not exist."""
  if not file.is_file():
    return {}
  try:
    found = json.loads(file.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(
      f'{str(file)!r}, which may name the end of a document, is not JSON '
      f'({line(error)}); repair or remove it'
    ) from error
  return found if isinstance(found, dict) else {}


def load_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer of `data.tokenizer`: 'bytes' or a file."""
  return ByteTokenizer() if name == 'bytes' else HFTokenizer(name)
