"""What a run reports: metrics.jsonl, TensorBoard, a progress line, a plot.

A row of `metrics.jsonl` is `{"step": 20, "train/loss": 2.31, ...}`: the values
after that many steps, under the prefix `train` or `valid`. NaN and infinities,
which JSON lacks, are written as strings; `read_metrics` returns them as floats.
Every write is made where it is asked for, so that a disk that is full stops the
run with an error; a terminal that has gone does not.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from efficient_attn.train.workdir import naming

# The metrics shown while training, and how: a line of about 75 columns.
SHOWN = {
  'loss': 'loss {:.3f}'.format,
  'bits_per_byte': '{:.3f} bits/byte'.format,
  'accuracy': '{:.1%} accuracy'.format,
  'tokens_per_second': lambda x: f'{tqdm.format_sizeof(x)} tokens/s',
  'images_per_second': lambda x: f'{tqdm.format_sizeof(x)} images/s',
}
_BAR = '{bar:8} {n_fmt}/{total_fmt}{postfix}'
_LINE = 'step {n_fmt}/{total_fmt}{postfix}, {elapsed} elapsed'
_SECONDS_BETWEEN_LINES = 10
_SECONDS_BETWEEN_FLUSHES = 10  # of TensorBoard's file, to the disk itself


class MetricWriter:
  """Writes the metrics of a run; only the first process writes.

  Args:
    workdir: of the run.
    total_steps: of the run.
    step: from which the run starts or resumes. Rows past it are dropped, and a
      row that is already there is not written again, so that a resumed run
      ends with each row once.
  """

  def __init__(
    self, workdir: str | os.PathLike, total_steps: int, step: int = 0
  ):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / 'metrics.jsonl'
    kept = [row for row in _rows(self._path) if row['step'] <= step]
    new = self._path.with_suffix('.new')
    with naming(new):
      new.write_text(''.join(json.dumps(row) + '\n' for row in kept))
      new.replace(self._path)
    self._written = {(row['step'], _prefix(row)) for row in kept}
    self._file = self._path.open('a')
    self._events = _Events(workdir / 'tensorboard', step)
    self._terminal = sys.stderr.isatty()
    self._next_line = 0.0
    self._bar = tqdm(
      total=total_steps,
      initial=step,
      # Elsewhere than on a terminal, tqdm only formats our lines.
      file=sys.stderr if self._terminal else io.StringIO(),
      mininterval=0.1 if self._terminal else math.inf,
      miniters=1,
      dynamic_ncols=self._terminal,
      bar_format=_BAR if self._terminal else _LINE,
    )
    self._format = self._bar.bar_format
    self._steps = self._seconds = 0  # that `step_seconds` stands for

  def write(
    self, step: int, metrics: Mapping[str, float], prefix: str = 'train'
  ) -> None:
    """Writes one row, and shows it."""
    if not self._active:
      return
    values = {name: float(value) for name, value in metrics.items()}
    if (step, prefix) not in self._written:
      self._written.add((step, prefix))
      row = {f'{prefix}/{name}': value for name, value in values.items()}
      strict = {k: v if math.isfinite(v) else str(v) for k, v in row.items()}
      with naming(self._path):
        self._file.write(json.dumps({'step': step} | strict) + '\n')
        self._file.flush()
      self._events.write(step, row)
    if prefix == 'train':
      self.show(step, values)
    else:
      self.message(f'step {step}: {prefix} {_shown(values)}')

  def has(self, step: int, prefix: str) -> bool:
    """Whether a row is there; all processes ask, and get the same answer."""
    there = self._active and (step, prefix) in self._written
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(there)))

  def show(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows the progress, without a row."""
    if not self._active:
      return
    self._estimate(step, metrics.get('step_seconds'))
    with contextlib.suppress(OSError):
      self._bar.set_postfix_str(_shown(metrics), refresh=False)
      self._bar.update(step - self._bar.n)
    due = time.monotonic() >= self._next_line or step == self._bar.total
    if due and not self._terminal:
      self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
      self.message(str(self._bar))

  def _estimate(self, step, seconds):
    """Shows the time left, which tqdm would count from the compilation on."""
    if seconds is not None:
      self._steps += step - self._bar.n
      self._seconds += (step - self._bar.n) * seconds
    if self._steps:
      left = (self._bar.total - step) * self._seconds / self._steps
      shown = f', {tqdm.format_interval(left)} left'
      self._bar.bar_format = self._format + shown

  def message(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._active:
      with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stderr)

  def close(self) -> None:
    """Ends the bar and the files."""
    if self._active:
      with contextlib.suppress(OSError):
        self._bar.close()
      with naming(self._path), self._file:
        self._events.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


class _Events:
  """TensorBoard's file, written by this thread and not behind its back."""

  def __init__(self, directory: pathlib.Path, step: int):
    directory.mkdir(parents=True, exist_ok=True)
    self._directory = directory
    self._next_flush = 0.0
    with naming(directory):
      # The step makes the name unique: two starts may share a second.
      self._writer = EventsWriter(str(directory / 'events'), f'.{step}')
      # TensorBoard forgets what an earlier start wrote from that step on.
      start = SessionLog(status=SessionLog.START)
      self._add(step=step + 1, session_log=start)

  def _add(self, **event):
    self._writer.write_event(Event(wall_time=time.time(), **event))

  def write(self, step: int, row: Mapping[str, float]) -> None:
    with naming(self._directory):
      for tag, value in row.items():
        self._add(step=step, summary=scalar(tag, value))
      if time.monotonic() >= self._next_flush:
        self._next_flush = time.monotonic() + _SECONDS_BETWEEN_FLUSHES
        self._writer.flush()

  def close(self) -> None:
    with naming(self._directory):
      self._writer.close()


def _shown(values):
  return ', '.join(f(values[k]) for k, f in SHOWN.items() if k in values)


def _prefix(row):
  return next((key.split('/')[0] for key in row if '/' in key), '')


def _rows(path):
  """Returns the rows of a file, without lines that a crash has damaged."""
  if not path.exists():
    return []
  *lines, _ = path.read_bytes().split(b'\n')  # the last one is half or empty
  return [row for row in map(_row, lines) if row is not None]


def _row(line):
  try:
    row = json.loads(line)
    for value in row.values():
      float(value)
  except (ValueError, TypeError, AttributeError, OverflowError):
    return None
  return row if type(row.get('step')) is int else None


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the rows of `metrics.jsonl`."""
  rows = _rows(pathlib.Path(workdir) / 'metrics.jsonl')
  return [
    {k: float(v) if isinstance(v, str) else v for k, v in row.items()}
    for row in rows
  ]


def _curve(rows, name):
  """Returns the steps and the finite values of one metric."""
  points = [(row['step'], row[name]) for row in rows if name in row]
  points = np.array(points, float).reshape(-1, 2)
  return points[np.isfinite(points[:, 1])].T


def _smooth(values):
  """Centred moving average over a thirtieth of the points."""
  window = np.ones(2 * (len(values) // 60) + 1)
  count = np.convolve(np.ones_like(values), window, 'same')
  return np.convolve(values, window, 'same') / count


def _bits_per_nat(rows):
  """Bits/byte over loss, which with a tokenizer varies a little by row."""
  for prefix in ('valid', 'train'):
    loss, bits = f'{prefix}/loss', f'{prefix}/bits_per_byte'
    both = [row for row in rows if row.get(loss, 0) > 0 and bits in row]
    ratios = [row[bits] / row[loss] for row in both]
    ratios = [ratio for ratio in ratios if 0 < ratio < math.inf]
    if ratios:
      return np.median(ratios)
  return math.nan


def plot_loss(workdir: str | os.PathLike) -> pathlib.Path:
  """Draws the training and validation loss; returns the path of loss.png."""
  from matplotlib.figure import Figure  # half a second

  rows = read_metrics(workdir)
  figure = Figure(figsize=(7, 4), layout='constrained')
  axes = figure.subplots()
  steps, losses = _curve(rows, 'train/loss')
  axes.plot(steps, losses, color='C0', alpha=0.25, linewidth=1)
  if len(steps):
    axes.plot(steps, _smooth(losses), color='C0', label='train, smoothed')
  steps, losses = _curve(rows, 'valid/loss')
  if len(steps):
    axes.plot(steps, losses, 'o-', color='C1', markersize=4, label='validation')
  if axes.get_legend_handles_labels()[0]:
    axes.legend(frameon=False)
  axes.set(xlabel='step', ylabel='loss (nats)')
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)
  ratio = _bits_per_nat(rows)
  if math.isfinite(ratio):
    scale = (lambda nats: nats * ratio, lambda bits: bits / ratio)
    axes.secondary_yaxis('right', functions=scale).set_ylabel('bits/byte')
  path = pathlib.Path(workdir) / 'loss.png'
  figure.savefig(path, dpi=150)
  return path
