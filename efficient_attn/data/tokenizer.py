"""Text to token ids and back: raw bytes, or a Hugging Face tokenizer file.

`token_bytes` says how many UTF-8 bytes each id stands for, so that the loss of
any tokenizer can be reported in bits per byte: sum(loss) / log(2) over
sum(token_bytes[targets]).
"""

import json
import pathlib
import re
from typing import Protocol

import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.data import optional

# What tokenizers call the end of a document, when no tokenizer_config.json
# beside the file says it.
EOS_TOKENS = (
  '<|endoftext|>',
  '<|end_of_text|>',
  '</s>',
  '<eos>',
  '<|im_end|>',
  '[SEP]',
)


class Tokenizer(Protocol):
  """What the text pipeline, sampling and evaluation need."""

  vocab_size: int
  eos_id: int | None  # ends a document, and stands before the first token
  token_bytes: np.ndarray  # [vocab_size] int32

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns int32 ids, with no special tokens added."""

  def decode(self, ids) -> str:
    """Returns the text of `ids`; invalid bytes become U+FFFD."""


class ByteTokenizer:
  """A token is a byte; byte 0, which text does not use, ends a document."""

  vocab_size = 256
  eos_id = 0

  def __init__(self):
    self.token_bytes = np.ones(256, np.int32)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the bytes of `text`."""
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids) -> str:
    """Returns the text of `ids`; invalid bytes become U+FFFD."""
    return np.asarray(ids, np.uint8).tobytes().decode(errors='replace')


class HFTokenizer:
  """A `tokenizer.json` of the `tokenizers` library."""

  def __init__(self, path: str):
    file = pathlib.Path(path)
    if not file.is_file():
      raise ConfigError(
        f"data.tokenizer={path!r}: no such file; give 'bytes' or the path of a "
        'tokenizer.json'
      )
    tokenizers = optional.require('tokenizers', 'data.tokenizer', path)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
      raise ConfigError(
        f'data.tokenizer={path!r} is not a tokenizer.json: {error}'
      ) from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    vocab = self._tokenizer.get_vocab()
    self.vocab_size = max(vocab.values()) + 1
    named = [_configured_eos(file.parent / 'tokenizer_config.json')]
    self.eos_id = next(
      (vocab[t] for t in (*named, *EOS_TOKENS) if t in vocab), None
    )
    self.token_bytes = self._count_bytes(vocab)

  def _count_bytes(self, vocab):
    decoder = json.loads(self._tokenizer.to_str())['decoder']
    byte_level = 'ByteLevel' in json.dumps(
      decoder
    )  # also in a Sequence of them
    counts = np.zeros(self.vocab_size, np.int32)
    for token, index in vocab.items():
      counts[index] = _num_bytes(token, byte_level)
    for index, token in self._tokenizer.get_added_tokens_decoder().items():
      counts[index] = 0 if token.special else len(token.content.encode())
    return counts

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns int32 ids, with no special tokens added."""
    if isinstance(text, bytes):
      text = text.decode(errors='replace')
    encoded = self._tokenizer.encode(text, add_special_tokens=False)
    return np.array(encoded.ids, np.int32)

  def decode(self, ids) -> str:
    """Returns the text of `ids`; invalid bytes become U+FFFD."""
    return self._tokenizer.decode(np.asarray(ids).tolist())


def _configured_eos(file):
  if not file.is_file():
    return None
  token = json.loads(file.read_text()).get('eos_token')
  return token['content'] if isinstance(token, dict) else token


def _num_bytes(token: str, byte_level: bool) -> int:
  if byte_level:  # the vocabulary writes every byte as one character
    return len(token)
  if re.fullmatch('<0x[0-9A-F]{2}>', token):  # sentencepiece's single bytes
    return 1
  return len(token.removeprefix('##').replace('▁', ' ').encode())


def load_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer of `data.tokenizer`: 'bytes' or a file."""
  return ByteTokenizer() if name == 'bytes' else HFTokenizer(name)
