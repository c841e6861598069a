"""State tracking: the product of all elements of a group so far.

Parity and addition modulo m are cyclic groups, S_3 and S_5 permutations; S_5 is
not solvable, so that its word problem is complete for NC^1 (2404.08819).
"""

import dataclasses
import functools
import itertools

import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.data.tasks.example import Example, Task, answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTracking(Task):
  """x_1 x_2 ...: at every token the product x_1 x_2 ... x_t.

  Attributes:
    group: parity, S_3, S_4, S_5, or Z_m for addition modulo m.
    seq_len: number of tokens.
    valid_after: in validation only answers from this position on count, for
      shortcuts work at short lengths.
  """

  group: str = 'parity'
  seq_len: int = 64
  valid_after: int = 0

  def __post_init__(self):
    multiplication(self.group)

  @property
  def num_tokens(self) -> int:
    """Of the vocabulary."""
    return len(multiplication(self.group))

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example."""
    product = multiplication(self.group)
    tokens = rng.integers(len(product), size=self.seq_len)
    labels = list(itertools.accumulate(tokens, lambda a, b: product[a, b]))
    start = 0 if train else self.valid_after
    return answers(tokens, labels, slice(start, None))


@functools.cache
def multiplication(group: str) -> np.ndarray:
  """Returns the table of products; element 0 is the identity."""
  kind, _, size = (
    'Z_2'.partition('_') if group == 'parity' else (group.partition('_'))
  )
  if kind not in ('Z', 'S') or not size.isdigit() or int(size) < 2:
    raise ConfigError(
      f'data.options.group={group!r} is unknown; pass parity, Z_m or S_n'
    )
  if kind == 'Z':
    elements = np.arange(int(size))
    return (elements[:, None] + elements) % int(size)
  if int(size) > 5:
    raise ConfigError(f'data.options.group={group!r} is too large; at most S_5')
  permutations = list(itertools.permutations(range(int(size))))
  number = {p: i for i, p in enumerate(permutations)}
  return np.array(
    [
      [number[tuple(a[i] for i in b)] for b in permutations]
      for a in permutations
    ]
  )
