"""Associative recall: which value followed this key?

MQAR is of Zoology (2312.04927) and Based (2402.18668); the recall tasks
`InContextRecall`, `NoisyRecall` and `FuzzyRecall` are of MAD (2403.17844);
`Needle` is the retrieval of RULER (2404.06654) with tokens for words.
"""

import dataclasses
import functools

import numpy as np

from efficient_attn.data.tasks.example import Example, Task, answers, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(Task):
  """Multi-query associative recall.

  k_1 v_1 ... k_P v_P, then filler in which every key comes once more, at
  distances distributed like a power law, p(n) ~ n^(power - 1); the answer there
  is its value. Keys and values of an example all differ.

  Attributes:
    vocab_size: keys are 1 to V/2 - 1, values V/2 to V - 1, the filler is 0.
    segments: (length, pairs, weight), of which each example takes one; shorter
      ones are filled up behind.
    power: of the distances.
    random_non_queries: the filler, too, is random tokens. A key of the second
      part is then followed by what is not its value.
  """

  vocab_size: int = 8192
  segments: tuple[tuple[int, ...], ...] = ((64, 4, 1),)
  power: float = 0.01
  random_non_queries: bool = False

  def __post_init__(self):
    for length, pairs, _ in self.segments:
      check(self, 4 * pairs <= length, 'a length must be 4 times the pairs')
      check(
        self, pairs < self.vocab_size // 2, 'vocab_size / 2 must exceed pairs'
      )

  @property
  def most_answers(self) -> int:
    """Bounds the answers of an example."""
    return max(pairs for _, pairs, _ in self.segments)

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example of the longest segment's length."""
    del train
    shares = np.array([weight for *_, weight in self.segments], float)
    length, pairs, _ = self.segments[
      rng.choice(len(shares), p=shares / shares.sum())
    ]
    half = self.vocab_size // 2
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(half, pairs, replace=False)
    tokens = np.zeros(max(segment[0] for segment in self.segments), np.int32)
    if self.random_non_queries:
      tokens[:length] = rng.integers(self.vocab_size, size=length)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    distances = _distances((length - 2 * pairs) // 2, self.power)
    queries = 2 * pairs + 2 * rng.choice(
      len(distances), pairs, replace=False, p=distances
    )
    tokens[queries] = keys
    labels = np.zeros_like(tokens)
    labels[queries] = values
    return answers(tokens, labels, queries)


@functools.cache
def _distances(count: int, power: float) -> np.ndarray:
  p = power * np.arange(1.0, count + 1) ** (power - 1)
  return p / p.sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextRecall(Task):
  """Pairs k v k v ...; a key that comes again has the value it had.

  The last key is one that was there before. In training every next token is an
  answer; in validation only the values of keys seen before.

  Attributes:
    vocab_size: keys are the first half, values the second, of what is left
      after the noise.
    seq_len: number of tokens and of the one behind them.
    noise_vocab: tokens that mean nothing (noisy recall).
    noise: share of the pairs that are two of them.
  """

  vocab_size: int = 16
  seq_len: int = 128
  noise_vocab: int = 0
  noise: float = 0.0

  def __post_init__(self):
    check(self, self.seq_len % 2 == 0, 'seq_len must be even')
    check(self, self.seq_len > 2, 'seq_len must be > 2')
    check(self, 0 <= self.noise < 1, 'noise must be in [0, 1)')
    check(
      self, self.vocab_size - self.noise_vocab >= 4, 'keys and values: 2 each'
    )

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns seq_len - 1 tokens."""
    half = (self.vocab_size - self.noise_vocab) // 2
    count = self.seq_len // 2
    values = half + rng.integers(half, size=half)
    keys = rng.integers(half, size=count)
    noisy = rng.random(count) < self.noise
    noisy[[0, -1]] = False
    keys[-1] = rng.choice(keys[:-1][~noisy[:-1]])
    pairs = np.stack([keys, values[keys]], 1)
    start = self.vocab_size - self.noise_vocab
    pairs[noisy] = rng.integers(
      start, max(self.vocab_size, start + 1), size=(noisy.sum(), 2)
    )
    tokens = pairs.reshape(-1)
    where = np.ones(len(tokens) - 1, bool)
    if not train:
      seen = [
        not noisy[i] and keys[i] in keys[:i][~noisy[:i]] for i in range(count)
      ]
      where[:] = False
      where[::2] = seen
    return answers(tokens[:-1], tokens[1:], where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
  """`InContextRecall` with pairs of noise between."""

  vocab_size: int = 32
  noise_vocab: int = 16
  noise: float = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
  """`InContextRecall` whose keys and values are motifs of several tokens.

  A motif is 1 to `motif` different tokens; in validation keys have exactly
  `motif`. The last pair has been there before. Filler stands in front.

  Attributes:
    vocab_size: keys use the first half, values the second; the filler is one
      token more.
    seq_len: number of tokens and of the one behind them.
    motif: longest motif.
  """

  vocab_size: int = 16
  seq_len: int = 128
  motif: int = 3

  def __post_init__(self):
    check(self, self.motif <= self.vocab_size // 2, 'motif: at most V / 2')
    check(self, self.seq_len >= 4 * self.motif, 'seq_len: at least 4 motif')

  @property
  def num_tokens(self) -> int:
    """Of the vocabulary."""
    return self.vocab_size + 1

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns seq_len - 1 tokens."""
    half = self.vocab_size // 2

    def size():
      return rng.integers(1, self.motif + 1)

    def key():
      length = size() if train else self.motif
      return tuple(rng.permutation(half)[:length])

    # The last pair comes first into the sequence, and again at its end.
    last, values, drawn = key(), {}, []
    room = self.seq_len
    for k in [last]:
      values[k] = tuple(half + rng.permutation(half)[: size()])
      room -= 2 * (len(k) + len(values[k]))
    while True:
      k = key()
      v = values.get(k) or tuple(half + rng.permutation(half)[: size()])
      if len(k) + len(v) > room:
        break
      values[k] = v
      room -= len(k) + len(v)
      drawn.append(k)
    drawn.insert(rng.integers(len(drawn) + 1), last)
    drawn.append(last)
    tokens, asked, seen = [self.vocab_size] * room, [False] * room, set()
    for k in drawn:
      tokens += [*k, *values[k]]
      asked += [False] * len(k) + [train or k in seen] * len(values[k])
      seen.add(k)
    if train:
      asked = [token < self.vocab_size for token in tokens]
    return answers(tokens[:-1], tokens[1:], np.array(asked[1:]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Task):
  """Random tokens and one mark twice: what followed it the first time?

  Attributes:
    vocab_size: the mark is the last token.
    seq_len: number of tokens.
  """

  vocab_size: int = 16
  seq_len: int = 64
  most_answers = 1

  def __post_init__(self):
    check(self, self.seq_len > 2, 'seq_len must be > 2')

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example, whose only answer is at its end."""
    del train
    tokens = rng.integers(self.vocab_size - 1, size=self.seq_len)
    first = rng.integers(self.seq_len - 2)
    tokens[[first, -1]] = self.vocab_size - 1
    return answers(tokens, tokens[first + 1], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Task):
  """Needles `mark key value` in a haystack; at the end `query key` -> value.

  Attributes:
    vocab_size: one third each are hay, keys and values, the last two tokens
      the mark and the query.
    seq_len: number of tokens.
    needles: how many keys there are; more than one distract.
    queries: how many of them are asked for.
  """

  vocab_size: int = 98
  seq_len: int = 256
  needles: int = 1
  queries: int = 1

  def __post_init__(self):
    third = (self.vocab_size - 2) // 3
    check(self, 1 <= self.queries <= self.needles, 'ask for 1 to all needles')
    check(self, self.needles <= third, 'vocab_size: 3 for each needle, and 2')
    room = self.seq_len - 3 * self.needles - 2 * self.queries
    check(self, room >= 0, 'seq_len: 3 for each needle and 2 for each query')

  @property
  def most_answers(self) -> int:
    """Bounds the answers of an example."""
    return self.queries

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example."""
    del train
    third = (self.vocab_size - 2) // 3
    mark, query = self.vocab_size - 2, self.vocab_size - 1
    keys = third + rng.choice(third, self.needles, replace=False)
    values = 2 * third + rng.integers(third, size=self.needles)
    hay = self.seq_len - 3 * self.needles - 2 * self.queries
    slots = hay + self.needles
    is_needle = np.zeros(slots, bool)
    is_needle[rng.choice(slots, self.needles, replace=False)] = True
    tokens, needle = [], iter(zip(keys, values, strict=True))
    for found in is_needle:
      tokens += [mark, *next(needle)] if found else [rng.integers(third)]
    labels = [0] * len(tokens)
    for i in rng.choice(self.needles, self.queries, replace=False):
      tokens += [query, keys[i]]
      labels += [0, values[i]]
    where = np.arange(self.seq_len - 2 * self.queries + 1, self.seq_len, 2)
    return answers(tokens, labels, where)
