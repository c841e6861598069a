import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from efficient_attn.train import metrics
from efficient_attn.train.metrics import MetricWriter, plot_loss, read_metrics


def run(workdir, first, last, total=10):
  """Writes steps first + 1 to last, with validation every 2."""
  with MetricWriter(workdir, total, first) as writer:
    for step in range(first + 1, last + 1):
      writer.write(step, {'loss': 1 / step, 'grad_norm': step})
      if step % 2 == 0:
        writer.write(step, {'loss': 2 / step}, 'valid')


def test_rows_are_json_lines(tmp_path):
  run(tmp_path, 0, 2)
  rows = [
    {'step': 1, 'train/loss': 1.0, 'train/grad_norm': 1.0},
    {'step': 2, 'train/loss': 0.5, 'train/grad_norm': 2.0},
    {'step': 2, 'valid/loss': 1.0},
  ]
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == rows
  assert read_metrics(tmp_path) == rows


def test_device_scalars_keep_every_bit(tmp_path):
  value = jax.numpy.float32(0.1)
  with MetricWriter(tmp_path, 1) as writer:
    writer.write(1, {'loss': value})
  assert np.float32(read_metrics(tmp_path)[0]['train/loss']) == value


def test_rows_are_flushed_at_once(tmp_path):
  with MetricWriter(tmp_path, 2) as writer:
    writer.write(1, {'loss': 1.0})
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_non_finite_values_are_valid_json(tmp_path, value):
  with MetricWriter(tmp_path, 1) as writer:
    writer.write(1, {'loss': value, 'tokens_per_second': value})

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  text = (tmp_path / 'metrics.jsonl').read_text()
  json.loads(text, parse_constant=refuse)
  np.testing.assert_equal(read_metrics(tmp_path)[0]['train/loss'], value)


def test_a_resumed_run_has_each_row_once(tmp_path):
  run(tmp_path / 'whole', 0, 10)
  run(tmp_path / 'cut', 0, 7)
  with (tmp_path / 'cut' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 8, "train/lo')  # killed while it wrote
  run(tmp_path / 'cut', 4, 10)
  whole, cut = (
    (tmp_path / name / 'metrics.jsonl').read_text() for name in ('whole', 'cut')
  )
  assert whole == cut


@pytest.mark.parametrize(
  'line',
  [
    b'',
    b'{}',
    b'[]',
    b'null',
    b'3',
    b'\0' * 40,
    b'\xff\xfe{"step": 2}',
    b'{"step": 2, "train/lo',
    b'{"step": "2", "train/loss": 1.0}',
    b'{"step": 2.5, "train/loss": 1.0}',
    b'{"step": true, "train/loss": 1.0}',
    b'{"step": 2, "train/loss": "nbn"}',
    b'{"step": 2, "train/loss": [1.0]}',
    b'{"step": 2, "train/loss": null}',
    b'{"step": 2, "train/loss": 1' + b'0' * 400 + b'}',
    b'{"step": 2, "train/loss": 1.0}{"step": 3}',
    b'{"step": 2, "train/l\x0bss": 1.0}',
  ],
)
def test_a_damaged_line_costs_itself(line, tmp_path):
  run(tmp_path, 0, 3)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b''.join([*whole[:1], line + b'\n', *whole[2:]]))
  expected = [json.loads(row) for row in [whole[0], *whole[2:]]]
  assert read_metrics(tmp_path) == expected
  run(tmp_path, 3, 4)
  assert read_metrics(tmp_path)[:-2] == expected
  plot_loss(tmp_path)


def test_a_row_that_is_there_is_not_written_again(tmp_path):
  run(tmp_path, 0, 4)
  with MetricWriter(tmp_path, 10, 4) as writer:
    writer.write(4, {'loss': 9.0}, 'valid')  # evaluated again on resuming
    writer.write(5, {'loss': 9.0})
  rows = read_metrics(tmp_path)
  assert [r['step'] for r in rows if 'valid/loss' in r] == [2, 4]
  assert [r['step'] for r in rows if 'train/loss' in r] == [1, 2, 3, 4, 5]


def events(workdir):
  """Returns the (step, tag, value) of the event files, in order of time."""
  found = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      found += [
        (event.step, v.tag, v.simple_value) for v in event.summary.value
      ]
  return found


def test_tensorboard_forgets_what_is_done_again(tmp_path):
  run(tmp_path, 0, 4)
  run(tmp_path, 2, 4)
  (path,) = (tmp_path / 'tensorboard').glob('*.2')
  content = path.read_bytes()
  first = int.from_bytes(content[:8], 'little') + 16
  length = int.from_bytes(content[first : first + 8], 'little')
  event = event_pb2.Event.FromString(content[first + 12 : first + 12 + length])
  assert event.step == 3
  assert event.session_log.status == event_pb2.SessionLog.START


def test_tensorboard_has_the_rows(tmp_path):
  run(tmp_path, 0, 2)
  assert events(tmp_path) == [
    (1, 'train/loss', 1.0),
    (1, 'train/grad_norm', 1.0),
    (2, 'train/loss', 0.5),
    (2, 'train/grad_norm', 2.0),
    (2, 'valid/loss', 1.0),
  ]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with MetricWriter(tmp_path / 'run', 10) as writer:
    writer.write(1, {'loss': 1.0})
    writer.message('hello')
  assert not (tmp_path / 'run').exists()


def test_a_log_gets_a_plain_line_now_and_then(tmp_path, capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  with MetricWriter(tmp_path, 100) as writer:
    for step in range(1, 101):
      now[0] = step * 0.25
      writer.write(
        step,
        {'loss': 1.25, 'bits_per_byte': 1.803, 'tokens_per_second': 18234},
      )
    writer.write(100, {'loss': 1.5, 'accuracy': 0.25}, 'valid')
  lines = capsys.readouterr().err.splitlines()
  assert [line.split(',')[0] for line in lines] == [
    *(f'step {step}/100' for step in (1, 41, 81, 100)),
    'step 100: valid loss 1.500',
  ]
  assert 'loss 1.250, 1.803 bits/byte, 18.2k tokens/s, 00:' in lines[1]
  assert lines[1].endswith('elapsed') and '\r' not in ''.join(lines)
  assert lines[-1].endswith('25.0% accuracy')


def test_the_time_left_is_that_of_steps_alone(tmp_path, monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  with MetricWriter(tmp_path, 2050, 50) as writer:
    # A minute of compilation, and one of validation after step 60.
    for step, seconds, clock in (
      (51, None, 60),
      (60, 1.0, 70),
      (70, 1.0, 140),
      (90, 2.5, 190),
    ):
      now[0] = clock
      timed = {} if seconds is None else {'step_seconds': seconds}
      writer.write(step, {'loss': 1.0} | timed)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].endswith('elapsed')  # nothing is known yet
  assert lines[1].endswith(', 33:10 left')  # 1990 s
  assert lines[2].endswith(', 33:00 left')
  mean = (9 + 10 + 20 * 2.5) / 39
  left = metrics.tqdm.format_interval(1960 * mean)
  assert lines[3].endswith(f', {left} left')


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, 'stderr', terminal)
  monkeypatch.setenv('COLUMNS', '100')
  with MetricWriter(tmp_path, 4, 2) as writer:
    writer.write(3, {'loss': 1.25})
    writer.message('saved')
    writer.write(4, {'loss': 1.0})
  text = terminal.getvalue()
  assert ' 2/4\r' in text and 'saved\n' in text
  last = text.rstrip('\n').split('\r')[-1]
  assert last == '######## 4/4, loss 1.000'


def drawn(workdir):
  """Returns the axes of the figure that plot_loss saves."""
  from matplotlib.figure import Figure

  figures = []
  save = Figure.savefig
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      Figure,
      'savefig',
      lambda self, *a, **k: (figures.append(self), save(self, *a, **k)),
    )
    path = plot_loss(workdir)
  assert path == workdir / 'loss.png'
  assert path.read_bytes().startswith(b'\x89PNG')
  return figures[0].axes[0]


def test_plot_has_both_losses_and_bits(tmp_path):
  with MetricWriter(tmp_path, 200) as writer:
    for step in range(1, 201):
      loss = 1.4 + 4 / step
      writer.write(step, {'loss': loss if step != 50 else float('nan')})
      if step % 50 == 0:
        bits = loss / np.log(2)
        writer.write(step, {'loss': loss, 'bits_per_byte': bits}, 'valid')
  axes = drawn(tmp_path)
  raw, smooth, valid = axes.lines
  assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 199
  assert np.ptp(smooth.get_ydata()) < np.ptp(raw.get_ydata())
  np.testing.assert_array_equal(valid.get_xdata(), [50, 100, 150, 200])
  (bits,) = axes.child_axes
  assert bits.get_ylabel() == 'bits/byte'
  np.testing.assert_allclose(
    bits.get_ylim(), np.array(axes.get_ylim()) / np.log(2), rtol=1e-6
  )


def test_plot_of_little_or_nothing(tmp_path):
  with MetricWriter(tmp_path, 2) as writer:
    assert not drawn(tmp_path).child_axes
    writer.write(1, {'loss': 1.0})
    assert len(drawn(tmp_path).lines) == 2


def test_smoothing_keeps_a_constant():
  np.testing.assert_allclose(metrics._smooth(np.full(100, 3.0)), 3.0)


def test_matplotlib_is_imported_only_to_plot():
  code = 'import sys; import efficient_attn.train.metrics; '
  code += 'assert "matplotlib" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], check=True)
