"""Damaged records: one error for them, and how many of them a run survives."""

import grain

from efficient_attn.config import ConfigError


class BadDataError(ConfigError):
  """Data that cannot be read; the message names the file and the place.

  `data.load` raises it about what it can see. An iterator raises it once too
  many records are damaged, or none has text, and its `get_state` is then that
  before the batch which failed: a checkpoint saved at that point loses no step.
  """


def line(error: Exception) -> str:
  """Returns the first line of what a library says about an error."""
  return str(error).strip().partition('\n')[0] or type(error).__name__


def allowed(records: int) -> int:
  """Returns how many damaged records are skipped: 1 %, or 10 of a few.

  Never more than half: at least as many are left as are skipped.
  """
  return min(max(10, records // 100), records // 2)


class Restored(grain.IterDataset):
  """Batches whose iterator keeps a state to save when its data is bad."""

  def __iter__(self):
    return _RestoredIterator(iter(self._parent))


class _RestoredIterator(grain.DatasetIterator):
  """Remembers the state before a batch, some rows of which may be made.

  The state is not set anew on failure, which could mean reading again what
  cannot be read.
  """

  def __init__(self, parent):
    super().__init__(parent)
    self._failed = None

  def __next__(self):
    before = self.get_state()
    try:
      if self._failed is not None:
        self._parent.set_state(before)
      batch = next(self._parent)
    except BadDataError:
      self._failed = before
      raise
    self._failed = None
    return batch

  def get_state(self):
    return self._parent.get_state() if self._failed is None else self._failed

  def set_state(self, state):
    self._failed = None
    self._parent.set_state(state)
