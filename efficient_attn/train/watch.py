"""Watches a run from the side: signals, divergence, its data, the profiler."""

import copy
import pathlib
import signal
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficient_attn.config import Config, ConfigError
from efficient_attn.train.checkpoint import Checkpoints


class StopSignal:
  """Turns SIGTERM, SIGINT and SIGHUP into a request to stop after the step.

  With several processes they agree on the step, once every `every` steps. A
  second signal acts at once, except for SIGHUP, which the shell repeats when a
  terminal closes. Under nohup SIGHUP is ignored, as it was.
  """

  def __init__(self, every: int):
    self.name = None
    self._every = every
    self._before = {}

  def __enter__(self):
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      numbers.append(signal.SIGHUP)
    for number in numbers:
      self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    self.name = signal.Signals(number).name
    if number != signal.SIGHUP:
      signal.signal(number, self._before[number])

  def requested(self, step: int) -> bool:
    """Whether to stop after this step."""
    if jax.process_count() == 1:
      return self.name is not None
    if step % self._every:
      return False
    asked = np.asarray(self.name is not None)
    if not multihost_utils.process_allgather(asked).any():
      return False
    self.name = self.name or 'a signal to another process'
    return True


class NonFiniteError(RuntimeError):
  """The loss or the gradient of a step was not finite."""


class StepGuard:
  """Stops a run that diverges, or whose batches have no target.

  A step that is not finite has left the state as it was. A batch without a
  target is possible, but `_EMPTY` of them in a row are a mistake.
  """

  _EMPTY = 10

  def __init__(self, config: Config, checkpoints: Checkpoints):
    self._skip = config.skip_nonfinite
    self._most_empty = min(self._EMPTY, config.steps)
    self._checkpoints = checkpoints
    self._in_a_row = 0
    self._empty_in_a_row = 0
    self._batches = {}

  def remember(self, step: int, batch: dict[str, np.ndarray]) -> None:
    """Keeps the batch of a step until the step has been checked."""
    self._batches[step] = batch

  def check(self, step: int, metrics: dict[str, jax.Array]) -> dict:
    """Returns the metrics of a step as floats.

    Raises:
      NonFiniteError: the step diverged, and too many before it.
      ConfigError: there was nothing to learn for too long.
    """
    values = {name: float(value) for name, value in metrics.items()}
    batch = self._batches.pop(step)
    empty = not values.pop('weight')
    self._empty_in_a_row = self._empty_in_a_row + 1 if empty else 0
    if self._empty_in_a_row >= self._most_empty:
      raise ConfigError(
        f'step {step}: no batch of the last {self._empty_in_a_row} steps has a '
        'target, so that there is nothing to learn; change data.path, options, '
        'seq_len or packing'
      )
    self._in_a_row = 0 if values.pop('finite') else self._in_a_row + 1
    if self._in_a_row > self._skip:
      crc = 0
      for array in batch.values():
        crc = zlib.crc32(np.ascontiguousarray(array), crc)
      self._checkpoints.wait()
      steps = self._checkpoints.steps()
      last = self._checkpoints.directory / str(steps[-1]) if steps else 'none'
      raise NonFiniteError(
        f'step {step}: loss={values["loss"]}, grad_norm={values["grad_norm"]} '
        f'on the batch with crc32 {crc:08x}; last good checkpoint: {last}. '
        'Lower optimizer.learning_rate, or set skip_nonfinite to skip such '
        'steps'
      )
    return values


class Batches:
  """Iterates over training batches and can return to the end of the last one.

  An iterator that fails may have moved on in some of its rows. It is then wound
  back to the last mark, and forth to the batches that were taken since.
  """

  def __init__(self, iterator):
    self.iterator = iterator
    self.mark()

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self.iterator)
    self._taken += 1
    return batch

  def mark(self) -> None:
    """Makes this the place that `rewind` begins from."""
    self._state = copy.deepcopy(self.iterator.get_state())
    self._taken = 0

  def rewind(self) -> None:
    """Puts the iterator behind the last batch that was taken."""
    self.iterator.set_state(copy.deepcopy(self._state))
    for _ in range(self._taken):
      next(self.iterator)


class Tracer:
  """Writes a profiler trace of the steps 'first:last' (last excluded)."""

  def __init__(self, steps: str, workdir: pathlib.Path):
    self._first, self._last = parse_steps(steps) if steps else (None, None)
    self._directory = workdir / 'profile'
    self._on = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._stop()

  def at(self, step: int) -> None:
    """Starts or stops the trace before this step."""
    if step == self._first:
      jax.profiler.start_trace(self._directory)
      self._on = True
    elif step == self._last:
      self._stop()

  def _stop(self):
    if self._on:
      jax.profiler.stop_trace()
      self._on = False


def parse_steps(text: str) -> tuple[int, int]:
  """Reads '10:15'."""
  first, _, last = text.partition(':')
  if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
    raise ConfigError(
      f"profile_steps={text!r} must be 'first:last', as '10:15'"
    )
  return int(first), int(last)
