"""Writing down again what was read: selected, backwards, or from a stack.

`SelectiveCopying` is of MAD (2403.17844) and Mamba (2312.00752), `Palindrome`
and `Stack` are of Kimi Linear (2510.26692).
"""

import dataclasses

import numpy as np

from efficient_attn.data.tasks.example import Example, Task, answers, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
  """Tokens between blanks, to be repeated in order without them.

  Attributes:
    vocab_size: the last two tokens are the blank and the sign to begin.
    seq_len: number of tokens.
    copied: how many are to be repeated, at the end of the sequence.
  """

  vocab_size: int = 16
  seq_len: int = 256
  copied: int = 16

  def __post_init__(self):
    check(self, self.vocab_size > 3, 'vocab_size must be > 3')
    check(
      self, self.seq_len > 2 * self.copied, 'seq_len: more than twice copied'
    )

  @property
  def most_answers(self) -> int:
    """Bounds the answers of an example."""
    return self.copied

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example."""
    del train
    blank, begin = self.vocab_size - 2, self.vocab_size - 1
    content = rng.integers(blank, size=self.copied)
    tokens = np.full(self.seq_len, blank)
    read = self.seq_len - self.copied - 1
    tokens[np.sort(rng.choice(read, self.copied, replace=False))] = content
    tokens[read] = begin
    labels = np.zeros(self.seq_len, int)
    labels[-self.copied :] = content
    return answers(tokens, labels, slice(-self.copied, None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Palindrome(Task):
  """x_1 ... x_n, a mark, and then x_n ... x_1.

  Attributes:
    vocab_size: the last token is the mark.
    seq_len: number of tokens, even: 2 n.
  """

  vocab_size: int = 17
  seq_len: int = 64

  def __post_init__(self):
    check(self, self.seq_len % 2 == 0, 'seq_len must be even')

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example, whose second half are answers."""
    del train
    half = self.seq_len // 2
    x = rng.integers(self.vocab_size - 1, size=half)
    tokens = np.concatenate([x, [self.vocab_size - 1], x[:0:-1]])
    return answers(tokens, np.concatenate([x, x[::-1]]), slice(half, None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack(Task):
  """Several stacks at once: `stack value` pushes, `stack pop` asks for the top.

  Attributes:
    stacks: number of stacks, the first tokens.
    values: number of values, the tokens after them; `pop` is the last.
    seq_len: number of tokens, even.
  """

  stacks: int = 4
  values: int = 16
  seq_len: int = 128

  def __post_init__(self):
    check(self, self.seq_len % 2 == 0, 'seq_len must be even')

  @property
  def num_tokens(self) -> int:
    """Of the vocabulary."""
    return self.stacks + self.values + 1

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example; pushes and pops are equally likely."""
    del train
    kept = [[] for _ in range(self.stacks)]
    tokens, labels, where = [], [], []
    for _ in range(self.seq_len // 2):
      stack = rng.integers(self.stacks)
      pop = bool(kept[stack]) and rng.random() < 0.5
      if pop:
        token, label = self.stacks + self.values, kept[stack].pop()
      else:
        token = label = self.stacks + rng.integers(self.values)
        kept[stack].append(token)
      tokens += [stack, token]
      labels += [0, label]
      where += [False, pop]
    return answers(tokens, labels, np.array(where))
