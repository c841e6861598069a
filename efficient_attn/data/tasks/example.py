"""What a task draws: tokens, and what to answer where."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from efficient_attn.config import ConfigError


class Example(NamedTuple):
  """One sequence.

  Attributes:
    tokens: int32 [T].
    labels: int32 [T], the answer wanted after tokens[: t + 1].
    weights: float32 [T], 1 where an answer counts, else 0.
  """

  tokens: np.ndarray
  labels: np.ndarray
  weights: np.ndarray


class Task:
  """What every task inherits: it draws its examples, unless it stores them."""

  @property
  def num_tokens(self) -> int:
    """Of the vocabulary."""
    return self.vocab_size

  @property
  def most_answers(self) -> int | None:
    """Bounds the answers of an example; None: every token may be one."""
    return None

  def stored(self, train: bool) -> Sequence[Any] | None:
    """Returns the items of a split, of which `read` makes examples."""
    del train
    return None

  def fingerprint(self, train: bool) -> str:
    """Returns a hash of what the examples of a split are made from."""
    content = hashlib.sha256(repr(self).encode())
    for part in self.content(train):
      content.update(part)
    return content.hexdigest()

  def content(self, train: bool) -> Iterable[bytes]:
    """Returns what `fingerprint` covers beside the options."""
    del train
    return ()


def answers(tokens, labels, where) -> Example:
  """An example whose answers count `where`, a mask or an index."""
  tokens = np.asarray(tokens, np.int32)
  weights = np.zeros(len(tokens), np.float32)
  weights[where] = 1
  labels = np.broadcast_to(np.asarray(labels, np.int32), tokens.shape)
  return Example(tokens, np.where(weights > 0, labels, 0), weights)


def check(task, ok: bool, remedy: str) -> None:
  """Raises a `ConfigError` with all options of the task unless `ok`."""
  if not ok:
    raise ConfigError(f'data.options: {task} is impossible; {remedy}')
