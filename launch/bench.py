"""Runs a benchmark suite on this machine and stores its figures.

python launch/bench.py --suite=trainer

The suites of TPUs that are not there store theirs by topology:

python launch/bench.py --suite=static --topology=v5e:2x2
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pathlib
import sys

from efficient_attn import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from efficient_attn.config import ConfigError, choose  # noqa: E402
from experiments.benchmarks import STATIC, SUITES  # noqa: E402
from experiments.machine import machine  # noqa: E402


def main():
  """Measures, prints and writes results/<device>/<suite>.json."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--suite', required=True, choices=SUITES)
  parser.add_argument('--rounds', type=int, default=5, help='repetitions')
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=ROOT / 'experiments' / 'benchmarks' / 'results',
    help='folder of the results',
  )
  parser.add_argument(
    '--topology', default='v5e:2x2', help='of TPUs, for the static suites'
  )
  parser.add_argument(
    '--only',
    type=lambda text: tuple(text.split(',')),
    help='rows of a static suite to measure again, by name; others stay',
  )
  args = parser.parse_args()
  args.out = args.out.absolute()  # counted from where the user is
  os.chdir(ROOT)
  with cli.clear_errors():
    measure = measure_static if args.suite in STATIC else measure_here
    path, record = measure(args)
  for name, value in record['figures'].items():
    print(f'{name:40} {value:g}')
  print(f'stored in {path}')


def measure_here(args: argparse.Namespace) -> tuple[pathlib.Path, dict]:
  """Measures on the device of this machine; returns where, and the record."""
  # A device a core is for runs that spread over them.
  collectives = args.suite in ('grid', 'trainer')
  many = collectives or args.suite in ('attention', 'linear')
  cli.use_cpu_devices(cli.count_cores() if many else 1, collectives)
  suite = importlib.import_module(SUITES[args.suite])
  figures = suite.measure(args.rounds)
  record = dict(suite=args.suite, rounds=args.rounds) | machine()
  path = args.out / record['device'] / f'{args.suite}.json'
  return path, write(path, record, figures)


def measure_static(args: argparse.Namespace) -> tuple[pathlib.Path, dict]:
  """Compiles for a topology; returns where the record is, and the record."""
  cli.use_cpu_devices(1)
  suite = importlib.import_module(SUITES[args.suite])
  for name in args.only or ():
    choose('--only', name, suite.ROWS)
  path = args.out / args.suite / f'{args.topology.replace(":", "_")}.json'
  record = dict(suite=args.suite, topology=args.topology) | machine()
  try:
    record['versions']['libtpu'] = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    raise ConfigError(
      f'--suite={args.suite} needs the compiler of TPUs: pip install'
      " 'efficient_attn[tpu]'"
    ) from None
  others = {}
  if args.only and path.exists():
    old = json.loads(path.read_text())
    if old['versions'] != record['versions']:
      raise ConfigError(
        f'--only={",".join(args.only)}: the other figures of {path} are of'
        f' {old["versions"]}, not {record["versions"]}; measure them all'
      )
    others = {
      name: value
      for name, value in old['figures'].items()
      if name.split('/')[0] not in args.only
    }
  figures = suite.measure(args.topology, args.only or tuple(suite.ROWS))
  found = write(path, record, others | figures)
  suite.write_report(path.parent)
  return path, found


def write(path: pathlib.Path, record: dict, figures: dict) -> dict:
  """Writes a record with its figures; returns it."""
  figures = {name: float(f'{value:.4g}') for name, value in figures.items()}
  record = record | dict(figures=figures)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(record, indent=2) + '\n')
  return record


if __name__ == '__main__':
  main()
