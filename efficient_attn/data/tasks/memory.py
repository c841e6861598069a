"""Knowledge in the weights, and a sequence in one vector (MAD, 2403.17844)."""

import dataclasses
import functools

import numpy as np

from efficient_attn.data.tasks.example import Example, Task, answers, check

MAP_SEED = 12345


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorization(Task):
  """key ? key ? ...: the value of each key, the same in every example.

  Attributes:
    vocab_size: keys are the first half, values the second, of all tokens but
      the last, which stands for the question.
    seq_len: number of tokens, even.
  """

  vocab_size: int = 256
  seq_len: int = 32

  def __post_init__(self):
    check(self, self.seq_len % 2 == 0, 'seq_len must be even')
    check(self, self.vocab_size > 4, 'vocab_size must be > 4')

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example, with an answer at every question."""
    del train
    half = (self.vocab_size - 1) // 2
    keys = rng.integers(half, size=self.seq_len // 2)
    tokens = np.full(self.seq_len, self.vocab_size - 1)
    tokens[::2] = keys
    values = half + _values(half)[keys]
    return answers(tokens, np.repeat(values, 2), slice(1, None, 2))


@functools.cache
def _values(count: int) -> np.ndarray:
  return np.random.default_rng(MAP_SEED).permutation(count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression(Task):
  """Random tokens and a mark; all are to be read off the mark's vector.

  For `model.name='auto_encoder'`, which passes on nothing else.

  Attributes:
    vocab_size: the last token is the mark.
    seq_len: number of tokens with the mark.
  """

  vocab_size: int = 16
  seq_len: int = 32

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example; every token is an answer."""
    del train
    tokens = rng.integers(self.vocab_size - 1, size=self.seq_len)
    tokens[-1] = self.vocab_size - 1
    return answers(tokens, tokens, slice(None))
