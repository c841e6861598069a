"""ListOps (1804.06028) with the lengths of Long Range Arena (2011.04006)."""

import dataclasses

import numpy as np

from efficient_attn.data.tasks.example import Example, Task, answers, check

# Tokens 0 to 9 are digits.
OPERATIONS = {
  10: min,
  11: max,
  12: lambda values: int(np.median(values)),
  13: lambda values: sum(values) % 10,
}
CLOSE, FILL = 14, 15
NESTED = 0.25  # chance that an argument is a list


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOps(Task):
  """[MAX 4 3 [MIN 2 3 ] 1 0 ] -> 4, with MIN, MAX, MED and SM (sum modulo 10).

  Attributes:
    min_len: tokens of the shortest expression.
    max_len: of the longest; shorter ones are filled up in front, so that the
      answer is at the last token.
    max_depth: of nested lists.
    max_args: arguments of a list, from 2 on.
  """

  min_len: int = 500
  max_len: int = 2000
  max_depth: int = 10
  max_args: int = 10
  num_tokens = FILL + 1
  most_answers = 1

  def __post_init__(self):
    check(self, self.max_args >= 2, 'a list has 2 arguments or more')
    check(self, 4 <= self.min_len <= self.max_len, '4 <= min_len <= max_len')
    longest = 1
    for _ in range(self.max_depth):
      longest = 2 + self.max_args * longest
    check(self, longest >= self.min_len, 'lists cannot be so long')

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one expression, the first that has a possible length."""
    del train
    while True:
      tokens, value = self._list(rng, 1)
      if self.min_len <= len(tokens) <= self.max_len:
        break
    tokens = [FILL] * (self.max_len - len(tokens)) + tokens
    return answers(tokens, value, -1)

  def _list(self, rng, depth):
    operation = int(rng.integers(10, 14))
    tokens, values = [operation], []
    for _ in range(rng.integers(2, self.max_args + 1)):
      if len(tokens) > self.max_len:
        break  # too long already
      if depth < self.max_depth and rng.random() < NESTED:
        inner, value = self._list(rng, depth + 1)
      else:
        value = int(rng.integers(10))
        inner = [value]
      tokens += inner
      values.append(value)
    return [*tokens, CLOSE], OPERATIONS[operation](values)
