"""What waits for a GPU: the parts of gpu.sh, most valuable first.

Each part is a command with a time budget. Its result, one file, is copied to
$OUT; a part whose result is there is skipped, and one that fails or takes too
long does not stop the next. Without a GPU the parts are only shown.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = pathlib.Path(__file__).with_name('README.md')
LIMIT = 460  # seconds of a call
BEGIN, END = '<!-- parts -->\n', '<!-- /parts -->\n'
# Workers share the GPU; its warnings are not those of a CPU.
PYTEST = (
  'JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest '
  'XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -n 12 -W default'
)
BENCH = 'python launch/bench.py --out=$WORK --rounds={} --suite={}'


class Part(NamedTuple):
  """One measurement.

  Attributes:
    name: of its result in $OUT.
    what: it shows.
    command: for bash; $WORK is a folder of its own.
    seconds: that it may take.
    result: a glob in $WORK.
  """

  name: str
  what: str
  command: str
  seconds: int
  result: str


PARTS = (
  Part(
    'accuracy.json',
    'linear family: outputs and gradients of every op, form and dtype against '
    'the recurrence in float64',
    'XLA_PYTHON_CLIENT_PREALLOCATE=false ' + BENCH.format(1, 'accuracy'),
    80,
    '*/accuracy.json',
  ),
  Part(
    'oracles.xml',
    'softmax family: outputs and gradients against the float64 oracles',
    PYTEST + ' -vv --junitxml=$WORK/oracles.xml tests/ops/attention_'
    '{,blockwise_,merge_,random_}test.py',
    60,
    'oracles.xml',
  ),
  Part(
    'attention.json',
    '`blockwise`, dense attention, `jax.nn` and cuDNN in turns, T up to 32k',
    BENCH.format(3, 'attention'),
    75,
    '*/attention.json',
  ),
  Part(
    'linear.json',
    'chunkwise forms, the recurrent scan and softmax in turns',
    BENCH.format(3, 'linear'),
    60,
    '*/linear.json',
  ),
  Part(
    'training.json',
    'training tokens/s, MFU and memory of a model of 125M parameters in '
    'bfloat16, by mixer',
    BENCH.format(3, 'training'),
    90,
    '*/training.json',
  ),
  Part(
    'survey.json',
    'speed claims of the surveys (R10)',
    'python launch/survey.py --tier=c --out=$WORK',
    70,
    'results.json',
  ),
  Part(
    'resume.json',
    'bitwise resume with deterministic kernels',
    'XLA_FLAGS=--xla_gpu_deterministic_ops=true ' + BENCH.format(1, 'resume'),
    40,
    '*/resume.json',
  ),
)  # fmt: skip
# What takes longer than gpu.sh may.
LONGER = (
  (
    'all other oracles of `tests/ops`',
    PYTEST + ' tests/ops',
  ),
  (
    'sub-quadratic layers against length',
    'python launch/bench.py --suite=sparse',
  ),
  (
    'trainer: step over the bare jitted step, compilation',
    'python launch/bench.py --suite=trainer',
  ),
  (
    '12 runs of MQAR as one program against one after another',
    'python launch/bench.py --suite=grid',
  ),
  (
    'the full studies of `configs/ablations`, beside the published values',
    'python launch/ablate.py --config=configs/ablations/based.py '
    '--out=runs/based',
  ),
  ('the quickstart', 'EXTRAS=cuda bash launch/quickstart.sh'),
)


def table() -> str:
  """Returns the parts as a table of markdown."""
  rows = [('what', 'command', 'at most'), ('---', '---', '---')]
  rows += [(p.what, f'`{p.command}`', f'{p.seconds} s') for p in PARTS]
  rows += [(what, f'`{command}`', '') for what, command in LONGER]
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def updated(text: str) -> str:
  """Returns README.md with the current table between its markers."""
  before, rest = text.split(BEGIN)
  return f'{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}'


def has_gpu() -> bool:
  """Whether the driver of NVIDIA has a GPU, without taking its memory."""
  return any(pathlib.Path('/dev').glob('nvidia[0-9]*'))


def run(part: Part, seconds: float, out: pathlib.Path, log) -> str:
  """Runs a part for at most `seconds`; returns how it ended."""
  with tempfile.TemporaryDirectory() as work:
    process = subprocess.Popen(
      ['bash', '-c', part.command],
      cwd=ROOT,
      env=os.environ | {'WORK': work},
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    try:
      code = process.wait(seconds)
    except subprocess.TimeoutExpired:
      code = None
    finally:  # also what it has started, also on Ctrl-C
      for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(5)  # pytest says how far it came
    found = sorted(pathlib.Path(work).glob(part.result))
    if code == 0 and found:
      shutil.copy(found[0], out / part.name)
      return 'done'
    if found:  # failed tests, say
      shutil.copy(found[0], out / f'failed.{part.name}')
  return f'more than {seconds:.0f} s' if code is None else f'failed ({code})'


def run_all(out: pathlib.Path, parts=PARTS, limit=LIMIT) -> dict[str, str]:
  """Runs the parts whose results `out` lacks; returns how each ended."""
  out.mkdir(parents=True, exist_ok=True)
  ended, begin = {}, time.monotonic()
  for part in parts:
    start = time.monotonic()
    seconds = min(part.seconds, limit - (start - begin))
    if (out / part.name).exists():
      ended[part.name] = 'done before'
    elif seconds <= 0:
      ended[part.name] = 'no time left'
    else:
      print(f'{part.name}: {part.command}', flush=True)
      with (out / 'log.txt').open('a') as log:
        log.write(f'\n== {part.name}: {part.command}\n')
        log.flush()
        ended[part.name] = run(part, seconds, out, log)
    print(
      f'{part.name}: {ended[part.name]} [{time.monotonic() - start:.0f} s]',
      flush=True,
    )
    (out / 'ended.json').write_text(json.dumps(ended, indent=1) + '\n')
  return ended


def main() -> None:
  """Runs the parts, or shows them where there is no GPU."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--readme', action='store_true', help='update README.md')
  if parser.parse_args().readme:
    README.write_text(updated(README.read_text()))
    return
  if not has_gpu():
    print(f'no GPU here; with one this would run, for {LIMIT} s at most:')
    for part in PARTS:
      print(f'{part.seconds:4} s  {part.name:15} {part.command}')
    return
  ended = run_all(pathlib.Path(os.environ.get('OUT', 'runs/gpu')).absolute())
  if set(ended.values()) - {'done', 'done before'}:
    raise SystemExit(1)


if __name__ == '__main__':
  main()
